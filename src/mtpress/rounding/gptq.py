"""GPTQ (Frantar et al., arXiv:2210.17323) with fixed scales: codes that make up for one another's rounding errors.

In: a matrix [N, K], the scales of its groups, and H [K, K], the sum of x xᵀ over what it is multiplied with. Out: codes of the same
format under the same scales, with less of tr(E H Eᵀ), E being what rounding changes: the output's squared error over these x.
Leaves out: where H comes from (calibration/full_hessian.py, calibration/gptq.py), and whether a layer is better off (calibration/gptq.py).

Columns are rounded one after the other, those with the largest diagonal of H first, while the scales stay those of the stored columns
("static groups"). To each column's weights is added, before it is rounded, what minimizes the error that is left given the errors made so
far. GPTQ takes that from the Cholesky factor of H⁻¹; it is the same as from H itself, as QuIP shows (Chee et al., arXiv:2307.13304,
theorem 6): with H = L Lᵀ, columns in ascending order of the diagonal, the error of a row is Σᵢ (Lᵢᵢeᵢ + Σⱼ﹥ᵢ Lⱼᵢeⱼ)², so that the last
column comes first and column i is rounded from wᵢ + Σⱼ﹥ᵢ (Lⱼᵢ/Lᵢᵢ)eⱼ, e = w − ŵ. Without an inverse it is a third of the operations.

Arithmetic is that of H's dtype. SCALES is the table of the scale choices.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mtpress.errors import InputError
from mtpress.formats import int4, nvfp4
from mtpress.rounding import four_over_six, hessian, rtn, search, sweep
from mtpress.rounding.max import weight_amax
from mtpress.rounding.scale_search import GroupScales

DAMPING = 0.05  # of the mean diagonal
BLOCK_COLUMNS = 128  # rounded before what they did wrong reaches the others, as one matrix product
PANEL = 1024  # rows or columns of H that are moved at a time
MOST_DAMPING = 10.0

Scales = tuple[Tensor, ...]  # NVFP4: block scales e4m3 [N, K/16] and the float32 scalar; INT4: FP16 [N, K/128]
Stored = dict[str, Tensor]  # suffix → tensor, as formats/ names them


@dataclass(frozen=True)
class Format:
    """A 4-bit format: its groups, its grid, and how codes and scales are stored."""

    group_size: int
    encode: Callable[[Tensor], Tensor]  # w / step → codes uint8
    decode: Callable[[Tensor], Tensor]  # codes → float32
    steps: Callable[[Scales], Tensor]  # float32 [N, K/group_size], what a code is multiplied with
    store: Callable[[Tensor, Scales], Stored]
    dequantize: Callable[[Stored], Tensor]  # float32 [N, K]


def _nvfp4_stored(codes: Tensor, scales: Scales) -> Stored:
    return {nvfp4.WEIGHT: nvfp4.pack(codes), nvfp4.SCALE: scales[0], nvfp4.SCALE_2: scales[1]}


FORMATS = {
    "nvfp4": Format(
        nvfp4.GROUP_SIZE, nvfp4.encode, nvfp4.decode, lambda scales: scales[0].float() * scales[1], _nvfp4_stored,
        lambda stored: nvfp4.dequantize(stored[nvfp4.WEIGHT], stored[nvfp4.SCALE], stored[nvfp4.SCALE_2]),
    ),
    "int4": Format(
        int4.GROUP_SIZE, int4.nearest_codes, lambda codes: codes.float() - int4.ZERO, lambda scales: scales[0].float(),
        lambda codes, scales: int4.tensors(codes, scales[0]),
        lambda stored: int4.dequantize(stored[int4.QWEIGHT], stored[int4.QZEROS], stored[int4.SCALES]),
    ),
}  # fmt: skip


def _max_scales(weights: Mapping[str, Tensor], blocks: Tensor) -> dict[str, Scales]:
    amax = weight_amax(weights)
    scale_2 = nvfp4.global_scale(amax.cpu()).to(amax.device)
    return {name: (nvfp4.block_scales(weight, scale_2), scale_2) for name, weight in weights.items()}


def _of_group(chosen: GroupScales) -> dict[str, Scales]:
    return {name: (scales, chosen.scale_2) for name, scales in chosen.scales.items()}


# Format → choice → scales of matrices that read the same input, by name; blocks: Σ x xᵀ of that input, float64 [K/16, 16, 16].
# plan/recipe.py has the names too, the first being what is taken if the recipe names none.
SCALES: dict[str, dict[str, Callable[[Mapping[str, Tensor], Tensor], dict[str, Scales]]]] = {
    "nvfp4": {
        "hessian": lambda weights, blocks: _of_group(hessian.group_scales(weights, blocks)),
        "sweep": lambda weights, _: _of_group(sweep.group_scales(weights)),
        "four-over-six": lambda weights, _: _of_group(four_over_six.group_scales(weights)),
        "max": _max_scales,
    },
    "int4": {
        "hessian": lambda weights, blocks: {name: search.round_matrix(weight, hessian=blocks)[1:] for name, weight in weights.items()},
        "search": lambda weights, _: {name: search.round_matrix(weight)[1:] for name, weight in weights.items()},
        "rtn": lambda weights, _: {name: rtn.round_matrix(weight)[1:] for name, weight in weights.items()},
    },
}


@dataclass(frozen=True)
class Factor:
    """What round_matrix needs of H: columns in ascending order of its diagonal, and its lower Cholesky factor in that order."""

    order: Tensor  # int64 [K]
    lower: Tensor  # [K, K]


def factorize(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """The factor of H + damping · (mean of H's diagonal) · I. hessian: float32 or float64 [K, K], symmetric; it is used up.

    A column that nothing was multiplied with has zeros in H and stands alone: it gets its nearest codes. Where rounding has made H so
    indefinite that the factor does not exist, damping is doubled until it does. InputError where H is not finite.
    """
    k = hessian.shape[0]
    mean = hessian.diagonal().double().mean()
    if not bool(mean.isfinite()):
        raise InputError(f"the mean square of what a linear reads is {float(mean)}; the source weights are damaged")
    order = hessian.diagonal().argsort(stable=True)
    for start in range(0, k, PANEL):  # in place: a second matrix would be 1.2 GB at the width of 27B
        hessian[start : start + PANEL] = hessian[start : start + PANEL, order]
    for start in range(0, k, PANEL):
        hessian[:, start : start + PANEL] = hessian[order, start : start + PANEL]
    unit = float(mean) or 1.0
    hessian.diagonal().add_(damping * unit if mean else unit)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            return Factor(order, lower)
        assert damping < MOST_DAMPING  # it is then dominated by its diagonal
        hessian.diagonal().add_(damping * unit)
        damping *= 2


def nearest(weight: Tensor, scales: Scales, form: Format) -> Tensor:
    """Codes uint8 [N, K] of a matrix [N, K], each the nearest under its scale."""
    steps = form.steps(scales)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    rows = max(1, nvfp4.ROWS_BYTES // (4 * weight.shape[1]))
    for start in range(0, len(weight), rows):
        some = slice(start, start + rows)
        groups = weight[some].view(-1, steps.shape[1], form.group_size).float()
        codes[some] = form.encode(groups / steps[some].unsqueeze(-1)).flatten(1)
    return codes


def round_matrix(weight: Tensor, scales: Scales, factor: Factor, form: Format) -> Tensor:
    """Codes uint8 [N, K] of a matrix [N, K], finite, that make up for one another's errors."""
    n, k = weight.shape
    dtype = factor.lower.dtype
    columns = weight.t()[factor.order]  # [K, N]: a column of the matrix is contiguous
    steps = form.steps(scales).to(dtype).t().contiguous()
    group = (factor.order // form.group_size).tolist()
    errors = torch.empty(k, n, dtype=dtype, device=weight.device)
    codes = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    for end in range(k, 0, -BLOCK_COLUMNS):
        start = max(0, end - BLOCK_COLUMNS)
        feedback = factor.lower[start:, start:end] / factor.lower.diagonal()[start:end]
        wanted = columns[start:end].to(dtype)
        block = errors[start:end].copy_(wanted)
        wanted.addmm_(feedback[end - start :].t(), errors[end:])
        for i in reversed(range(end - start)):
            step = steps[group[start + i]]
            target = wanted[i].addmv_(block[i + 1 :].t(), feedback[i + 1 : end - start, i])
            code = form.encode(target / step)
            codes[start + i] = code
            block[i] -= form.decode(code) * step
    stored = torch.empty_like(codes)
    stored[factor.order] = codes
    return stored.t().contiguous()
