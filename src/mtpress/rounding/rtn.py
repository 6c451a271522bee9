"""INT4 by plain rounding: the largest magnitude of a group takes the code −8, everything else the nearest code.

In: a matrix [N, K], K a multiple of 128. Out: codes and FP16 scales (formats/int4.py packs them). Leaves out: any search.

Bit for bit auto-round 0.16.1 with iters=0 and its optimised search off (auto_round/data_type/int.py, quant_tensor_rtn_sym):
    scale = FP16(∓amax / 8), negative where the number of largest magnitude is positive, so that −8 · scale is that number;
            a magnitude below 1e-5 is raised to it, a group of zeros has +1e-5
    code  = nearest integer to w / scale in float32, ties to even, cut to −8…7, stored plus 8

The functions below define the arithmetic and run on any device. A compiled kernel gives the same bits of a BF16 matrix on
the CPU (formats/int4_kernel.py); `round_matrix` uses it where it is installed.
"""

import torch

from mtpress.formats import int4, int4_kernel

LEAST_SCALE = 1e-5  # auto-round's q_scale_thresh; FP16 holds it as a subnormal number of seven bits


def round_matrix(weight: torch.Tensor, by: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8 [N, K], scales fp16 [N, K/128]) of a matrix [N, K]; a scale is NaN or infinite where the group is not finite,
    or too large for FP16.

    by: a kernel's name; without it the fastest that takes the matrix. The bits of finite groups are the same.
    """
    by = by or (int4.kernel() if int4_kernel.takes(weight) else int4.EAGER)
    if by != int4.EAGER:
        return int4_kernel.round_matrix(weight, None, by)
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // int4.GROUP_SIZE, dtype=torch.float16, device=weight.device)
    rows = max(1, int4.PIECE_CODES // k)
    for start in range(0, n, rows):
        groups = weight[start : start + rows].reshape(-1, k // int4.GROUP_SIZE, int4.GROUP_SIZE)
        scale = group_scales(groups)
        scales[start : start + rows] = scale
        scaled = groups.float() / scale.float().unsqueeze(-1)
        codes[start : start + rows] = int4.nearest_codes(scaled).flatten(-2)
    return codes, scales


def group_scales(groups: torch.Tensor) -> torch.Tensor:
    """fp16 [...] of groups [..., 128]."""
    least, most = torch.aminmax(groups, dim=-1)
    least, most = -least.clamp(max=0), most.clamp(min=0)
    amax = torch.maximum(least, most)
    scale = (torch.where(most < least, amax, -amax) / -int4.MIN_CODE).to(torch.float16)
    return torch.where(scale < 0, scale.clamp(max=-LEAST_SCALE), scale.clamp(min=LEAST_SCALE))
