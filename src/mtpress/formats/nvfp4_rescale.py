"""One global scale for several NVFP4 matrices, without touching a 4-bit code: what their block scales become, and what it costs.

In: block scales float8_e4m3fn [N, K/16] and packed codes of matrices that an engine fuses, each under a global scale of its
own. Out: the global scale that serves them best, new block scales, whether every weight keeps its value exactly, and the
error where not. Leaves out: where the tensors come from, and whether an error is acceptable (stages/).

A weight is code·b·s. Under another global scale t it keeps its value where b' = b·s/t is an E4M3 number, so t/s must be a power of
two or, by luck, a ratio of two of E4M3's eight significands. Everything is compared in float64, where b·s (4 + 24 bits) is exact.
Blocks whose codes are all zero take any scale. Nothing here depends on the size of a matrix but `energies`: block scales have
256 values, so what a block scale weighs is counted once for each of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from mtpress.formats.nvfp4 import E2M1_VALUES, E4M3_MAX, GROUP_SIZE, ROWS_BYTES

NAN_BYTES = (0x7F, 0xFF)
CANDIDATES_PER_OCTAVE = 1024


class Reexpressed(NamedTuple):
    """scales: float8_e4m3fn [N, K/16]. exact: every weight has the value it had.

    relative_error: ‖new − old‖ / ‖old‖ over all weights (over block scales, where no codes were given); 0.0 where exact.
    """

    scales: torch.Tensor
    exact: bool
    relative_error: float


class Member(NamedTuple):
    """One matrix of a fused group: its float32 global scale, and `energies` of its blocks."""

    scale_2: float
    energies: torch.Tensor


class Shared(NamedTuple):
    """scale_2: the float32 global scale to share. exact: it costs nothing. relative_errors: of each member, in order."""

    scale_2: float
    exact: bool
    relative_errors: tuple[float, ...]


def _sizes() -> torch.Tensor:
    """float64 [256]: the size of the E4M3 number of each byte; its two NaNs count as 0."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().abs().nan_to_num(0.0)


SIZES_OF_BYTES = _sizes()  # a byte's low seven bits are the place of its size among SIZES, bit 7 is the sign
SIZES = SIZES_OF_BYTES[:127]  # ascending
MIDDLES = (SIZES[1:] + SIZES[:-1]) / 2


def energies(scales: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
    """float64 [256]: for each byte that a block scale can be, the sum of squares of the E2M1 values in the blocks that have it.

    scales: float8_e4m3fn [N, K/16]; packed: uint8 [N, K/2]. Without packed every block counts as one. ValueError for a NaN scale.
    """
    found = torch.zeros(256, dtype=torch.float64)
    squares = torch.tensor(E2M1_VALUES).square().repeat(2)  # bit 3 of a code is its sign
    pairs = (squares.view(1, 16) + squares.view(16, 1)).view(256)
    rows = max(1, ROWS_BYTES // (4 * GROUP_SIZE * scales.shape[1]))
    for start in range(0, scales.shape[0], rows):
        places = scales[start : start + rows].contiguous().view(torch.uint8).view(-1)
        if packed is None:
            found += torch.bincount(places, minlength=256)
        else:
            blocks = pairs[packed[start : start + rows].reshape(-1).int()].view(-1, GROUP_SIZE // 2).sum(dim=1)
            found += torch.bincount(places, weights=blocks.double(), minlength=256)
        if any((places == byte).any() for byte in NAN_BYTES):
            raise ValueError("a block scale is NaN")
    return found


def reexpress(
    scales: torch.Tensor, own_scale_2: float | torch.Tensor, shared_scale_2: float | torch.Tensor, packed: torch.Tensor | None = None
) -> Reexpressed:
    """Block scales [N, K/16] under own_scale_2, written anew under shared_scale_2, each rounded to the nearest E4M3 number.

    own_scale_2, shared_scale_2: positive float32 numbers. packed: codes uint8 [N, K/2]; with them blocks without a weight do not
    count. ValueError for a NaN scale.
    """
    own, shared = float(own_scale_2), float(shared_scale_2)
    table, errors, norms = _rescaled(own, torch.tensor([shared], dtype=torch.float64))
    weights = energies(scales, packed)
    exact = not bool(((errors[0] > 0) & (weights > 0)).any())
    return Reexpressed(
        table[0][scales.contiguous().view(torch.uint8).int()].view(torch.float8_e4m3fn), exact, _relative(errors, norms, weights)[0].item()
    )


def best_shared_scale(members: Sequence[Member]) -> Shared:
    """The global scale under which the members, re-expressed, lose least: nothing, if there is any such scale.

    Exact scales are searched exhaustively: the first member's largest block scale must become one of E4M3's 126 positive
    numbers. Of several the one closest to the members' largest is taken. Otherwise the least sum of squared errors among scales within
    one octave over the smallest that lets no block scale saturate; a larger one only loses small blocks.
    """
    live = [member for member in members if bool((member.energies * SIZES_OF_BYTES > 0).any())]
    largest = max(member.scale_2 for member in members)
    if not live:
        return Shared(largest, True, (0.0,) * len(members))
    peaks = [float(SIZES_OF_BYTES[member.energies > 0].max()) * member.scale_2 for member in live]
    exact = _exact_scales(live, _float32(peaks[0] / SIZES[1:]))
    if len(exact):
        closest = int((exact / largest).log2().abs().argmin())
        return Shared(exact[closest].item(), True, (0.0,) * len(members))
    least = max(peaks) / E4M3_MAX
    steps = torch.arange(CANDIDATES_PER_OCTAVE, dtype=torch.float64) / CANDIDATES_PER_OCTAVE
    own = torch.tensor([member.scale_2 for member in live], dtype=torch.float64)
    candidates = _float32(torch.cat([least * steps.exp2(), own * (least / own).log2().ceil().exp2()]))
    candidates = candidates[candidates * E4M3_MAX >= max(peaks)]
    squares = torch.stack([(errors * member.energies).sum(dim=1) for member, (_, errors, _) in _each(live, candidates)])
    best = candidates[int(squares.sum(dim=0).argmin())]
    relative = [_relative(errors, norms, member.energies)[0].item() for member, (_, errors, norms) in _each(members, best.view(1))]
    return Shared(best.item(), False, tuple(relative))


def _float32(values: torch.Tensor) -> torch.Tensor:
    """float64 values rounded to normal positive float32 numbers; what has none is left out."""
    rounded = values.float()
    return rounded[rounded.isfinite() & (rounded >= torch.finfo(torch.float32).tiny)].double()


def _each(members: Sequence[Member], shared: torch.Tensor) -> list[tuple[Member, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    return [(member, _rescaled(member.scale_2, shared)) for member in members]


def _exact_scales(members: Sequence[Member], candidates: torch.Tensor) -> torch.Tensor:
    """Those of the candidates [C] under which no member changes."""
    for member, (_, errors, _) in _each(members, candidates):
        wrong = (errors * (member.energies > 0)).sum(dim=1) > 0
        candidates = torch.where(wrong, torch.nan, candidates)
    return candidates[~candidates.isnan()]


def _rescaled(own: float, shared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under each global scale of float64 [C]: bytes uint8 [C, 256] in place of each byte, squared errors [C, 256], squared norms [256]."""
    before = SIZES_OF_BYTES * own
    places = torch.bucketize(before / shared.unsqueeze(1), MIDDLES)
    # On the middle between two numbers either is as near; casting rounds to the even one, and so does this.
    places += (MIDDLES[places.clamp(max=len(MIDDLES) - 1)] == before / shared.unsqueeze(1)) & (places % 2 == 1)
    errors = (SIZES[places] * shared.unsqueeze(1) - before).square()
    sign = (torch.arange(256) & 0x80).to(torch.uint8)
    return places.to(torch.uint8) | sign, errors, before.square()


def _relative(errors: torch.Tensor, norms: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """float64 [C]: ‖new − old‖ / ‖old‖ of errors [C, 256]; 0 where there is no weight at all."""
    whole = (norms * weights).sum()
    return ((errors * weights).sum(dim=1) / whole).sqrt() if whole > 0 else torch.zeros(len(errors), dtype=torch.float64)
