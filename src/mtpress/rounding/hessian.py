"""Scales by the local Hessian: of a window of E4M3 numbers the one that changes what the linear puts out least.

In: the matrices that share a global scale, and H = Σ x xᵀ over the calibration tokens in blocks of 16. Out: that scale and block
scales. Leaves out: codes (formats/nvfp4.py), which are the nearest ones, and gathering H (calibration/block_hessian.py). INT4: search.py.

A row's error δ = w − ŵ changes the output by Σ (δ·x)² = δᵀHδ; the blocks of H that lie on its diagonal are looked at, each for itself.
To each is added .05 of the mean of its diagonal, as GPTQ has it: for channels that the samples hardly reach. Where a block of the
input was zero throughout, errors count alike.

17 candidates, from 9 codes below the one that takes the largest magnitude to 6 to 7 above it. No window is exact here: errors of two
numbers can make up for one another. On mtpress-tiny all 126 make the held-out output error .1 % less (docs/rounding.md).
"""

from collections.abc import Mapping

import torch

from mtpress.rounding import scale_search

WINDOW = scale_search.Window(below=9, above=7)
DAMPING = 0.05


def group_scales(weights: Mapping[str, torch.Tensor], hessian: torch.Tensor) -> scale_search.GroupScales:
    """Of the matrices [N, K] of a fused group, by name; hessian float64 [K/16, 16, 16]."""
    return scale_search.group_scales(weights, WINDOW, cost(hessian))


def cost(hessian: torch.Tensor) -> torch.Tensor:
    """What errors of a block cost, float64 [K/16, 16, 16], each with the mean 1.05 on its diagonal."""
    one = torch.eye(hessian.shape[-1], dtype=torch.float64, device=hessian.device)
    mean = hessian.double().diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return torch.where(mean > 0, hessian / mean, one) + DAMPING * one
