"""INT4 with the scale of each group searched: the least squared error, positive and negative scales alike.

In: a matrix [N, K], K a multiple of 128, and what the linear reads, if errors are to count by it. Out: codes and FP16 scales
(formats/int4.py packs them). Leaves out: errors of one number that make up for those of another (rounding/signround.py).

For each group of 128 numbers w, in float32, every sum over the group in its order:
    first round   32 scales s = ±f·amax/7.5, f from 0.5 to 1.05. Under each the codes q = nearest integer to w/s in −8…7; the
                  error that the best scale for these codes leaves is Σw² − (Σwq)²/Σq². The codes that leave least give Σwq/Σq².
    second round  14 scales around that, to ±3 %, and ±amax/8, where plain rounding has its scale (rtn.py); each as FP16 stores
                  it. The one with the least Σ(w − s·q)².
On groups of N(0,1) and of Laplace numbers that leaves .0093 and .0172 of their energy: within 0.1 % of what 400 scales of either
sign from .3 to 1.1 leave at best (tests/rounding/test_search.py); one sign alone leaves .0102 and .0190, plain rounding .0106 and
.0199, and no group is left with more than plain rounding leaves it. A negative scale lets a group reach 8·|s| upwards.

By importance h (recipe: rounding hessian) every sum is weighted: Σ(hw)q, Σh(q²). hⱼ = Σxⱼ² over the calibration tokens, divided by its
mean, plus .05 (what GPTQ adds to the diagonal): channels that the samples do not reach count a little.

The functions below define the arithmetic and run on any device. A compiled kernel gives the same bits of a BF16 matrix on
the CPU (formats/int4_kernel.py); `round_matrix` uses it where it is installed.
"""

import torch

from mtpress.formats import int4, int4_kernel

NUM_COARSE = 32
LEAST_FRACTION, MOST_FRACTION, FINE_WIDTH = 0.5, 1.05, 0.03
LEAST_SCALE = 168 * 2.0**-24  # 1e-5 in FP16, as rtn.py has it
LEAST_AMAX = 2.0**-100  # its reciprocal is finite; nothing so small reaches LEAST_SCALE
FLOOR = 0.05
PIECE_GROUPS = 1 << 12


def _factors() -> torch.Tensor:
    """float32 [48]: ±7.5/f for 1/amax, in the second round factors for its middle, and two for amax."""
    half = NUM_COARSE // 2
    fractions = [LEAST_FRACTION + (MOST_FRACTION - LEAST_FRACTION) * i / (half - 1) for i in range(half)]
    coarse = [sign * 7.5 / f for sign in (1, -1) for f in fractions]
    fine = [1 + FINE_WIDTH * i / 7 for i in range(-6, 8)]
    return torch.tensor([*coarse, *fine, 1 / 8, -1 / 8], dtype=torch.float32)


FACTORS = _factors()


def round_matrix(weight: torch.Tensor, by: str | None = None, hessian: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K], scales fp16 [N, K/128]) of a matrix [N, K]; a scale is NaN where the group is not finite, infinite
    where it is too large for FP16.

    by: a kernel's name; without it the fastest that takes the matrix. The bits are the same.
    hessian: Σ x xᵀ float64 [K/16, 16, 16] of what the linear reads, whose diagonal counts.
    """
    by = by or (int4.kernel() if int4_kernel.takes(weight) else int4.EAGER)
    h = None if hessian is None else importance(hessian)
    if by != int4.EAGER:
        return int4_kernel.round_matrix(weight, FACTORS, by, h)
    n, k = weight.shape
    groups = weight.reshape(-1, int4.GROUP_SIZE)
    codes = torch.empty(groups.shape, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(groups), dtype=torch.float16, device=weight.device)
    for start in range(0, len(groups), PIECE_GROUPS):
        piece = slice(start, start + PIECE_GROUPS)
        rows = None
        if h is not None:
            numbers = torch.arange(start, min(start + PIECE_GROUPS, len(groups)))
            rows = h.view(-1, int4.GROUP_SIZE)[numbers % (k // int4.GROUP_SIZE)].to(weight.device)
        codes[piece], scales[piece] = _search_eagerly(groups[piece].float(), rows)
    return codes.view(n, k), scales.view(n, -1)


def importance(hessian: torch.Tensor) -> torch.Tensor:
    """float32 [K] on the CPU, with the mean 1.05, of Σ x xᵀ in blocks; all alike where nothing was read."""
    h = hessian.diagonal(dim1=-2, dim2=-1).flatten().double().cpu()
    mean = h.mean()
    return ((h / mean if mean > 0 else torch.ones_like(h)) + FLOOR).float()


def _search_eagerly(w: torch.Tensor, h: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [G, 128], scales fp16 [G]) of groups float32 [G, 128]; h [G, 128] or None."""
    factors = FACTORS.to(w.device).unsqueeze(-1)
    columns = w.t().contiguous()
    weights = None if h is None else h.t().contiguous()
    amax = w.abs().amax(-1)
    products, squares = _sums(columns, weights, factors[:NUM_COARSE] * (1.0 / amax.clamp(min=LEAST_AMAX)))
    best, middle = torch.zeros_like(amax), torch.full_like(amax, LEAST_SCALE)
    for gain, scale in zip(products * products / squares, products / squares, strict=True):
        middle = torch.where(gain > best, scale, middle)
        best = torch.where(gain > best, gain, best)
    candidates = torch.cat([middle * factors[NUM_COARSE:-2], amax * factors[-2:]]).half().float()
    least = torch.where(candidates < 0, -LEAST_SCALE, LEAST_SCALE)
    candidates = torch.where(candidates.abs() < LEAST_SCALE, least, candidates)
    products, squares = _sums(columns, weights, 1.0 / candidates)
    lowest, chosen = torch.full_like(amax, torch.inf), candidates[0].clone()
    for loss, candidate in zip(candidates * (candidates * squares - 2.0 * products), candidates, strict=True):
        chosen = torch.where(loss < lowest, candidate, chosen)
        lowest = torch.where(loss < lowest, loss, lowest)
    finite = amax.isfinite()
    codes = int4.nearest_codes(torch.where(finite.unsqueeze(-1), w, 0.0) * (1.0 / chosen).unsqueeze(-1))
    return codes, torch.where(finite, chosen, torch.nan).half()


def _sums(columns: torch.Tensor, weights: torch.Tensor | None, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σwq, Σq²), float32 [C, G], of groups as columns [128, G] under scales whose reciprocals are [C, G]; weights [128, G] or None."""
    products, squares = torch.zeros_like(inverse), torch.zeros_like(inverse)
    for i, w in enumerate(columns):
        q = (w * inverse).clamp_(int4.MIN_CODE, int4.MAX_CODE).round_()
        products += (w if weights is None else weights[i] * w) * q
        squares += q * q if weights is None else weights[i] * (q * q)
    return products, squares
