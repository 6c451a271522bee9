"""What is known of the numbers of one tensor after they have passed once.

In: rows of a tensor, some at a time. Out: `Statistics`. Leaves out: reading (survey.py) and judging (rules/values.py).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

E4M3_MAX = 448.0
CODES_FROM = 16.0  # numbers this large are held against the grid of E4M3


@dataclass
class Statistics:
    """rows, zero_rows, not_finite: of everything that passed; the rest of the rows that were looked at, which may be a sample.

    shape: of the tensor. low, high: the least and largest number. on_grid: whether every number is one that E4M3 has.
    same_rows: rows that are equal to the first. num_scales and equal_scales: block scales of a quantized matrix, and whether all are one.
    vector: the numbers themselves, of a tensor of one dimension.
    """

    shape: tuple[int, ...]
    quantized: bool = False
    rows: int = 0
    zero_rows: int = 0
    first_zero_row: int | None = None
    not_finite: int = 0
    bad_scales: int = 0
    num_scales: int = 0
    equal_scales: bool = False
    looked_at: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")
    on_grid: bool = True
    same_rows: int = 0
    vector: "torch.Tensor | None" = field(default=None, repr=False)
    _first: "torch.Tensor | None" = field(default=None, repr=False)

    @property
    def num_columns(self) -> int:
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        return columns

    @property
    def rms(self) -> float:
        return (self.squares / self.looked_at) ** 0.5 if self.looked_at else 0.0

    @property
    def is_zero(self) -> bool:
        return self.rows > 0 and self.zero_rows == self.rows

    @property
    def is_constant(self) -> bool:
        """One number everywhere, zero among them; or one row everywhere."""
        rows = self.looked_at // max(self.num_columns, 1)
        return self.is_zero or (self.looked_at > 1 and (self.low == self.high or (rows > 1 and self.same_rows == rows)))

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for tensors of equal numbers; of others, all but never."""
        return (self.shape, self.looked_at, self.total, self.squares, self.low, self.high)

    def pass_rows(self, zero: "torch.Tensor") -> None:
        """Rows in order, of which `zero` bool [n] says whether they hold nothing but zeros."""
        found = int(zero.sum())
        if found and self.first_zero_row is None:
            self.first_zero_row = self.rows + int(zero.int().argmax())
        self.zero_rows += found
        self.rows += len(zero)

    def look_at(self, rows: "torch.Tensor") -> None:
        """float32 [n, …]: rows whose numbers are added up, of what is finite."""
        import torch

        numbers = rows.reshape(len(rows), -1)
        if not numbers.numel():
            return
        squares = torch.linalg.vector_norm(numbers, dim=1).double().square()
        if not bool(squares.isfinite().all()):
            numbers = torch.where(numbers.isfinite(), numbers, 0.0)
            squares = torch.linalg.vector_norm(numbers.double(), dim=1).square()
        self.looked_at += numbers.numel()
        self.total += float(numbers.sum(1, dtype=torch.float64).sum())
        self.squares += float(squares.sum())
        self.low, self.high = min(self.low, float(numbers.amin())), max(self.high, float(numbers.amax()))
        if self.on_grid:
            self.on_grid = max(-self.low, self.high) >= CODES_FROM and _all_in_e4m3(numbers)
        if self._first is None:
            self._first = numbers[0].clone()
        if self.same_rows or self.looked_at == numbers.numel():
            self.same_rows += int((numbers == self._first).all(1).sum())

    def look_at_scales(self, scales: "torch.Tensor") -> None:
        """Block scales of a quantized matrix, in any float format."""
        numbers = scales.float()
        self.num_scales += numbers.numel()
        self.bad_scales += int((~numbers.isfinite()).sum())
        self.equal_scales = bool((numbers == numbers.reshape(-1)[0]).all())


def _all_in_e4m3(numbers: "torch.Tensor") -> bool:
    import torch

    if float(numbers.abs().amax()) > E4M3_MAX:
        return False
    return bool((numbers.to(torch.float8_e4m3fn).float() == numbers).all())
