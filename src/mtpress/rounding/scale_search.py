"""The search for NVFP4's block scales: which E4M3 number leaves a block the least rounding error.

In: a BF16 matrix [N, K], its global scale, and for a weighted error what the linear reads. Out: block scales float8_e4m3fn [N, K/16].
Leaves out: which search a recipe means (four_over_six.py, sweep.py, hessian.py), and codes, which formats/nvfp4.py rounds to nearest.

All in float32, for a block of w and each candidate E4M3 number v, every sum from the block's first number to its last:
    x     = (|w| · (1/scale_2)) · (1/v); where scale_2 is below 2⁻¹⁰⁰, it and w are taken times 2⁶⁴
    e     = x − the nearest E2M1 number, with the sign of w
    loss  = v² · Σ e²,    or by a form: v² · Σᵢ eᵢ Σ_{j≤i} formᵢⱼ eⱼ
The candidate of least loss is taken, of equal ones the least; a block of zeros has the scale 1. (Codes are made of w / (v · scale_2):
a number between two of them may take the other one, which is as near.)

The candidates are `below` codes under q0 = E4M3(amax16 / (6·scale_2)) to `above` over it. Neighbouring codes are neighbouring numbers,
and 8 codes up is the double, with which no error is less as long as the block is not cut: E2M1 numbers times 2 are E2M1 numbers. So for
a sum of independent errors `above` = 7 is enough. Where q0 is subnormal (below code 8) the doubles of the numbers from there on begin at
code 16, and all up to 15 are tried. scale_2 must reach: amax16 ≤ 6·448·scale_2.

Global scales are g / (6·256), not g / (6·448): the block with the group's largest number has q0 = 256, and room to 448.
The functions below define the arithmetic and run on any device. A compiled kernel gives the same bits of a BF16 matrix on the CPU.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from mtpress.formats import nvfp4, nvfp4_packing
from mtpress.rounding.max import weight_amax

ROOM = 256.0  # the block scale of the group's largest number; max has 448
HIGHEST = 126  # E4M3 code of 448
NORMAL = 8  # of the least number that is not subnormal
TINY, UP = 2.0**-100, 2.0**64
PIECE_BLOCKS = 1 << 16


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """weight_scale_2, float32 scalar, of the amax of a fused group: amax / (6·256), as if it were 1 where that is zero."""
    scale = amax.float() / (nvfp4.E2M1_MAX * ROOM)
    return torch.where(scale == 0, 1 / (nvfp4.E2M1_MAX * ROOM), scale)


class Window(NamedTuple):
    """The candidates: how many codes below and above the one that takes the largest magnitude to 6."""

    below: int
    above: int


SIX_OR_FOUR = Window(0, 0)  # that code, and the one that takes the largest magnitude to 4


class GroupScales(NamedTuple):
    """What is chosen for the matrices of a fused group: block scales float8_e4m3fn [N, K/16] by name, and the float32 weight_scale_2
    that they share. Of matrices that are not finite: a scale_2 that is not, and any block scales."""

    scales: dict[str, torch.Tensor]
    scale_2: torch.Tensor


def group_scales(weights: Mapping[str, torch.Tensor], window: Window, cost: torch.Tensor | None = None) -> GroupScales:
    """cost: float64 [K/16, 16, 16], symmetric, of errors of a block of all rows; None for the squared error."""
    amax = weight_amax(weights)
    scale_2 = global_scale(amax.cpu()).to(amax.device)  # on the CPU, as in max.py
    form = None if cost is None else form_of(cost)
    return GroupScales({name: search(weight, scale_2, window, form) for name, weight in weights.items()}, scale_2)


def nearest_codes(weights: Mapping[str, torch.Tensor], chosen: GroupScales) -> dict[str, dict[str, torch.Tensor]]:
    """Matrix name → {weight, weight_scale, weight_scale_2}: every number takes the nearest code under the chosen scales."""
    rounded = {}
    for name, weight in weights.items():
        packed, scales = nvfp4.quantize(weight, chosen.scale_2, scales=chosen.scales[name])
        rounded[name] = {nvfp4.WEIGHT: packed, nvfp4.SCALE: scales, nvfp4.SCALE_2: chosen.scale_2}
    return rounded


def search(
    weight: torch.Tensor, scale_2: torch.Tensor, window: Window, form: torch.Tensor | None = None, by: str | None = None
) -> torch.Tensor:
    """float8_e4m3fn [N, K/16] of a finite matrix [N, K].

    form: float32 [K/16, 16, 16] of form_of(), or None for the squared error.
    by: a kernel's name; without it the fastest that takes the matrix. The bits are the same.
    """
    by = by or (nvfp4.kernel() if nvfp4_packing.takes(weight) else nvfp4.EAGER)
    if by != nvfp4.EAGER:
        return nvfp4_packing.search(weight, scale_2, form, *window, by)
    n, k = weight.shape
    scales = torch.empty(n, k // nvfp4.GROUP_SIZE, dtype=torch.uint8, device=weight.device)
    rows = max(1, PIECE_BLOCKS * nvfp4.GROUP_SIZE // k)
    for start in range(0, n, rows):
        piece = weight[start : start + rows]
        scales[start : start + rows] = _search_eagerly(piece, scale_2, window, form)
    return scales.view(torch.float8_e4m3fn)


def form_of(hessian: torch.Tensor) -> torch.Tensor:
    """float32 [K/16, 16, 16] on the CPU, of symmetric matrices [K/16, 16, 16]: the lower triangle, beside the diagonal doubled.

    So Σ over it is Σ over all of the matrix, in half the products.
    """
    return (hessian.tril() + hessian.tril(-1)).float().cpu().contiguous()


def _search_eagerly(weight: torch.Tensor, scale_2: torch.Tensor, window: Window, form: torch.Tensor | None) -> torch.Tensor:
    """uint8 [N, K/16] codes."""
    blocks = weight.view(len(weight), -1, nvfp4.GROUP_SIZE)
    up = torch.where(scale_2 < TINY, UP, 1.0)
    sizes, signs = (blocks.abs().float() * up * (1.0 / (scale_2 * up))).unbind(-1), torch.where(blocks.signbit(), -1.0, 1.0).unbind(-1)
    first = nvfp4.block_scales(weight, scale_2).view(torch.uint8).int()
    if window == SIX_OR_FOUR:
        candidates = [first, _to_four(blocks, scale_2)]
    else:
        ends = torch.where(first < NORMAL, 2 * NORMAL - 1, first + window.above).clamp(max=HIGHEST)
        candidates = [(first + offset).clamp(min=1).minimum(ends) for offset in range(-window.below, int((ends - first).max()) + 1)]
    least, chosen = torch.full(first.shape, torch.inf, device=weight.device), first
    form = None if form is None else form.to(weight.device)
    for codes in candidates:
        value = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        inverse = 1.0 / value
        errors = [_rest(size * inverse) for size in sizes]
        total = _plain(errors) if form is None else _weighted([e * s for e, s in zip(errors, signs, strict=True)], form)
        loss = total * (value * value)
        chosen = torch.where(loss < least, codes, chosen)
        least = torch.where(loss < least, loss, least)
    one = torch.tensor(1.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(blocks.abs().amax(-1) == 0, one.to(weight.device), chosen.to(torch.uint8))


def _to_four(blocks: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """Codes of the scales that take each block's largest magnitude to 4."""
    scale = blocks.abs().amax(-1).float() / (4.0 * scale_2)
    scale = torch.where(scale == 0, 1.0, scale).clamp(nvfp4.E4M3_MIN_SUBNORMAL, nvfp4.E4M3_MAX)
    return scale.to(torch.float8_e4m3fn).view(torch.uint8).int()


def _rest(sizes: torch.Tensor) -> torch.Tensor:
    """Magnitudes less their nearest E2M1 number. Of two that are equally near either one does: what is left is as large."""
    return sizes - nvfp4.decode(nvfp4.encode(sizes))


def _plain(errors: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(errors[0])
    for error in errors:
        total += error * error
    return total


def _weighted(errors: list[torch.Tensor], form: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(errors[0])
    for i, error in enumerate(errors):
        product = torch.zeros_like(error)
        for j in range(i + 1):
            product += form[:, i, j] * errors[j]
        total += error * product
    return total
