"""Sign-gradient rounding (SignRound, Cheng et al., arXiv:2309.05516) of the linears of one block, as auto-round 0.16.1 does it.

In: a block, which of its linears are rounded, and its output error on a batch of samples. Out: 4-bit codes and FP16 scales of each
linear, and the losses. Leaves out: the samples and their way through the blocks (calibration/signround.py), and the stored layout
(formats/int4.py).

A weight w of a group of 128 with scale s becomes s·clip(round(w/s + v), -8, 7). Tuned are an offset v for each weight, and two
factors for each group on the smallest and the largest of its weights, of which the one of larger magnitude decides s. A step moves
each of them against the sign of its gradient, by a rate that falls linearly from 1/iterations to 0; round() passes gradients
through. The parameters of the iteration with the least loss are kept.

What differs from auto-round is how, not what: no gradient of the block is ever whole, as each linear's is used up row by row where
autograd makes it; offsets are int16 in units of 1/40000, in which the steps of 200 iterations are whole numbers; the weights that are
multiplied are made twice instead of kept; the best iteration is kept as codes. Memory beside the block is 2.7 bytes a weight.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtpress.errors import InputError
from mtpress.rounding import signround_kernel
from mtpress.rounding.batches import batches

GROUP_SIZE = signround_kernel.GROUP_SIZE
MIN_CODE, MAX_CODE = -8, 7
UNITS = 40_000  # of an offset in 1; formats/_signround.c has it too
MAX_OFFSET = 32767  # units; a run of more than one iteration does not come near it
LEAST_SCALE = 1e-5
LANES = 16  # partial sums of a group, in the order that the compiled kernel adds them
ROWS_BYTES = 16 << 20  # of a gradient at a time: what is written by a product is read again from the cache


def dequantize(weight: Tensor, offset: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """bfloat16 [N, K], in `out` if that is given: s · clip(round(w/s + v), -8, 7) in float32, rounded to BF16.

    weight bfloat16 [N, K], offset int16 [N, K], scale float32 [N, K/128].
    """
    out = torch.empty_like(weight) if out is None else out
    if signround_kernel.takes(weight):
        signround_kernel.dequantize(weight, offset, scale, out, signround_kernel.KERNELS[0])
    else:
        out.copy_((_rounded(weight, offset, scale)[1] * scale.unsqueeze(-1)).view_as(weight))
    return out


def pack_codes(weight: Tensor, offset: Tensor, scale: Tensor, out: Tensor) -> None:
    """Fills out uint8 [N, K/2]: codes 0…15 (the integer plus 8), the first of two in the lower half of a byte."""
    if signround_kernel.takes(weight):
        signround_kernel.pack_codes(weight, offset, scale, out, signround_kernel.KERNELS[0])
    else:
        codes = (_rounded(weight, offset, scale)[1] - MIN_CODE).to(torch.uint8).view_as(weight)
        out.copy_(codes[:, ::2] | codes[:, 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 [N, K] of what pack_codes fills."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def step(weight: Tensor, offset: Tensor, scale: Tensor, grad: Tensor, size: int) -> Tensor:
    """Moves offset by `size` units against the sign of its gradient; float32 [N, K/128], the gradient of the scales.

    grad bfloat16 [N, K] is that of the dequantized weight. By the chain rule, with q the code less 8 and "inside" where it was not
    clipped: d/dv = grad · s · inside, d/ds = sum over the group of grad · (q - inside · w/s). Sums are of 16 lanes, then of halves.
    """
    sums = torch.empty_like(scale)
    if signround_kernel.takes(weight):
        signround_kernel.step(weight, offset, scale, grad, size, sums, signround_kernel.KERNELS[0])
        return sums
    quotient, code, inside = _rounded(weight, offset, scale)
    d = grad.view_as(code).float()
    part = (d * (code - torch.where(inside, quotient, 0.0))).view(*scale.shape, -1, LANES)
    total = torch.zeros_like(part[..., 0, :])
    for i in range(part.shape[-2]):
        total = total + part[..., i, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    sums.copy_(total.squeeze(-1))
    moved = offset.view_as(code).int() - (d.sign() * scale.sign().unsqueeze(-1) * inside).int() * size
    offset.copy_(moved.clamp_(-MAX_OFFSET - 1, MAX_OFFSET).view_as(offset))
    return sums


def _rounded(weight: Tensor, offset: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w/s, the clipped integer, and whether it was not clipped; [N, K/128, 128] each."""
    quotient = weight.view(*scale.shape, GROUP_SIZE).float() / scale.unsqueeze(-1)
    unit = torch.tensor(1.0, dtype=torch.float32) / UNITS
    free = (quotient + offset.view_as(quotient).float() * unit).clamp_(MIN_CODE - 1, MAX_CODE + 1).round_()
    code = free.clamp(MIN_CODE, MAX_CODE)
    return quotient, code, free == code


def steps(iterations: int) -> list[int]:
    """Units that a parameter moves in each iteration: rates (1 - i/n)/n, rounded so that their sums are right to half a unit."""
    sums = [round(UNITS * (i / iterations - i * (i - 1) / (2 * iterations**2))) for i in range(iterations + 1)]
    return [min(after - before, MAX_OFFSET) for before, after in pairwise(sums)]


@dataclass(frozen=True)
class Rounded:
    """4-bit codes and scales of a linear; what it multiplies by is (code - 8) · scale."""

    packed: Tensor  # uint8 [N, K/2], two codes a byte
    scales: Tensor  # float16 [N, K/128], may be negative

    @property
    def codes(self) -> Tensor:
        """uint8 [N, K], 0…15."""
        return unpack_codes(self.packed)

    def dequantized(self) -> Tensor:
        """bfloat16 [N, K]; the product is exact in float32 and then rounded, as in tuning."""
        out = torch.empty(self.packed.shape[0], 2 * self.packed.shape[1], dtype=torch.bfloat16, device=self.packed.device)
        rows = max(1, (ROWS_BYTES >> 2) // out.shape[1])
        for start in range(0, len(out), rows):
            some = slice(start, start + rows)
            codes = unpack_codes(self.packed[some]).view(-1, self.scales.shape[1], GROUP_SIZE).float() + MIN_CODE
            out[some] = (codes * self.scales[some].float().unsqueeze(-1)).flatten(1)
        return out


class TunedLinear:
    """The tuned parameters of one linear, and its place in the autograd graph while it is tuned.

    weight: bfloat16 [N, K], K a multiple of 128, finite; it is read, not changed. InputError otherwise.
    scratch: bfloat16, at least N · K numbers that are worthless between two calls: fresh memory costs as much as what is put there.
    """

    def __init__(self, weight: Tensor, scratch: Tensor | None = None) -> None:
        n, k = weight.shape
        if weight.dtype != torch.bfloat16 or k % GROUP_SIZE:
            raise InputError(f"a {weight.dtype} matrix of {n}×{k} cannot be tuned; it must be BF16 with K a multiple of {GROUP_SIZE}")
        self.weight = weight.contiguous()
        self.scratch = torch.empty_like(self.weight).view(-1) if scratch is None else scratch
        self.offset = torch.zeros_like(self.weight, dtype=torch.int16)
        groups = self.weight.view(n, -1, GROUP_SIZE)
        low, high = groups.aminmax(dim=-1)
        self.lowest, self.highest = low.clamp(max=0).float().neg(), high.clamp(min=0).float()
        if not bool(torch.isfinite(self.lowest + self.highest).all()):
            raise InputError("it holds NaN or infinite values; the source is damaged, fetch it again")
        self.factors = torch.zeros(2, n, groups.shape[1], dtype=torch.int16, device=weight.device)  # less 1, of lowest and highest
        self.best_packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
        self.best_scales = torch.empty(n, groups.shape[1], dtype=torch.float16, device=weight.device)
        self.anchor = torch.zeros((), device=weight.device, requires_grad=True)  # autograd comes back only to what has such an input
        self.sum: Tensor | None = None  # of gradients, while a batch goes through in pieces
        self.on_gradient: Callable[[TunedLinear, Tensor, Tensor], None] = TunedLinear.collect
        self._set_scales()

    def _set_scales(self) -> None:
        """auto-round's quant_tensor_sym: the larger of the two magnitudes reaches -8, so the scale is negative where it is above 0."""
        factors = 1 + self.factors.float() / UNITS
        low, high = self.lowest * factors[0], self.highest * factors[1]
        below = high < low
        raw = (torch.where(below, 1.0, -1.0) * torch.maximum(low, high) / -MIN_CODE).half()
        least = torch.tensor(LEAST_SCALE).half()
        self.scale = torch.where(raw < 0, raw.clamp(max=-least), raw.clamp(min=least)).float()
        towards = torch.where(below, 1.0, -1.0) * (raw.abs() >= least)
        # derivatives of the scale, up to a positive factor
        self.slopes = torch.stack([towards * self.lowest * (low >= high), towards * self.highest * (high >= low)]).sign_().to(torch.int8)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] times the dequantized weights."""
        return _Product.apply(x, self.anchor, self)  # type: ignore[no-untyped-call, no-any-return]

    def dequantized(self) -> Tensor:
        """bfloat16 [N, K], in `scratch`."""
        out = self.scratch[: self.weight.numel()].view_as(self.weight)
        return dequantize(self.weight, self.offset, self.scale, out)

    def keep_best(self) -> None:
        """What the parameters are now is the best so far."""
        pack_codes(self.weight, self.offset, self.scale, self.best_packed)
        self.best_scales.copy_(self.scale)

    def best(self) -> Rounded:
        return Rounded(self.best_packed, self.best_scales)

    def collect(self, grad_out: Tensor, x: Tensor) -> None:
        """Adds grad_out^T x to the batch's gradient, in BF16: half the memory of float32, and only signs are used."""
        if self.sum is None:
            self.sum = torch.mm(grad_out.mT, x)
        else:
            self.sum.addmm_(grad_out.mT, x)

    def step_collected(self, size: int) -> None:
        assert self.sum is not None
        sums, self.sum = step(self.weight, self.offset, self.scale, self.sum, size), None
        self._move_factors(sums, size)

    def step_from(self, grad_out: Tensor, x: Tensor, size: int) -> None:
        """A step by the gradient grad_out^T x, some rows of it at a time."""
        n, k = self.weight.shape
        sums = torch.empty_like(self.scale)
        rows = max(1, ROWS_BYTES // (2 * k))
        grad = self.scratch[: min(rows, n) * k].view(-1, k)
        for start in range(0, n, rows):
            some = slice(start, min(start + rows, n))
            piece = torch.mm(grad_out[:, some].mT, x, out=grad[: some.stop - start])
            sums[some] = step(self.weight[some], self.offset[some], self.scale[some], piece, size)
        self._move_factors(sums, size)

    def _move_factors(self, sums: Tensor, size: int) -> None:
        moved = self.factors.int() - (sums.sign().to(torch.int8) * self.slopes).int() * size
        self.factors.copy_(moved.clamp_(-MAX_OFFSET, 0))
        self._set_scales()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, linear: TunedLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return F.linear(x, linear.dequantized())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        linear: TunedLinear = ctx.linear
        grad_out = grads[0].reshape(-1, grads[0].shape[-1])
        grad_in = (grad_out @ linear.dequantized()).view_as(x) if ctx.needs_input_grad[0] else None
        linear.on_gradient(linear, grad_out, x.reshape(-1, x.shape[-1]))
        return grad_in, None, None


class Block(Protocol):
    """The block's output error, on samples that are numbered from 0."""

    num_samples: int

    def pieces(self, batch: Sequence[int]) -> Sequence[Sequence[int]]:
        """The batch in parts that may be in memory at a time."""

    def loss(self, piece: Sequence[int], batch: Sequence[int]) -> Tensor:
        """float32 scalar with gradients: the sum of squared errors of a piece, over the number of elements of its batch."""


@dataclass(frozen=True)
class Settings:
    """auto-round's defaults."""

    iterations: int = 200
    batch_size: int = 8
    seed: int = 42


@dataclass(frozen=True)
class Losses:
    """Mean squared error of the block's output on a batch: of the first iteration, the least one, the last one."""

    before: float
    best: float
    last: float
    best_iteration: int

    def as_json(self) -> dict[str, float]:
        return {"before": self.before, "best": self.best, "last": self.last, "best_iteration": self.best_iteration}


@contextmanager
def tuned(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, TunedLinear]]:
    """While it lasts, these linears multiply by tuned weights. They must have no bias."""
    states: dict[str, TunedLinear] = {}
    largest = max((linear.weight for linear in linears.values()), key=torch.numel, default=torch.empty(0))
    scratch = torch.empty_like(largest).view(-1)
    for name, linear in linears.items():
        assert linear.bias is None
        try:
            states[name] = TunedLinear(linear.weight.detach(), scratch)
        except InputError as error:
            raise InputError(f"{name}.weight: {error}") from None
    try:
        for name, linear in linears.items():
            linear.forward = states[name].__call__  # type: ignore[method-assign, assignment]
        yield states
    finally:
        for linear in linears.values():
            linear.__dict__.pop("forward", None)


def tune(linears: Mapping[str, nn.Linear], block: Block, settings: Settings, order: str = "") -> tuple[dict[str, Rounded], Losses]:
    """Codes and scales of the linears by name, and the losses.

    order: which block this is; with the seed it decides the order of its samples. Same arguments on the same machine with the same
    number of threads give the same bytes.
    InputError for a matrix that cannot be tuned, or where the error is not a number.
    """
    if settings.iterations < 1:
        raise InputError("iterations must be at least 1")
    sampler = batches(block.num_samples, settings.batch_size, f"{settings.seed} {order}")
    losses: list[float] = []
    least, best_iteration = float("inf"), 0
    with tuned(linears) as states:
        for i, size in enumerate(steps(settings.iterations)):
            batch = next(sampler)
            pieces = block.pieces(batch)
            whole = len(pieces) == 1
            total = 0.0
            for piece in pieces:
                with torch.enable_grad():
                    loss = block.loss(piece, batch)
                total += float(loss.detach())
                best = whole and total < least
                for state in states.values():
                    state.on_gradient = _stepping(size, best) if whole else TunedLinear.collect
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
            if not total < float("inf"):
                raise InputError(f"the output error is {total}; the source weights are damaged")
            if not whole:
                for state in states.values():
                    if total < least:
                        state.keep_best()
                    state.step_collected(size)
            if total < least:
                least, best_iteration = total, i
            losses.append(total)
        return {name: state.best() for name, state in states.items()}, Losses(losses[0], least, losses[-1], best_iteration)


def _stepping(size: int, best: bool) -> Callable[[TunedLinear, Tensor, Tensor], None]:
    def on_gradient(linear: TunedLinear, grad_out: Tensor, x: Tensor) -> None:
        if best:
            linear.keep_best()
        linear.step_from(grad_out, x, size)

    return on_gradient


def install(linears: Mapping[str, nn.Linear], rounded: Mapping[str, Rounded]) -> None:
    """Gives the linears their rounded weights, one after the other; the old ones are let go."""
    for name, linear in linears.items():
        linear.weight = nn.Parameter(rounded[name].dequantized(), requires_grad=False)
