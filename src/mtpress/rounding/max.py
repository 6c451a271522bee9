"""Scales from the largest magnitude, codes by rounding to nearest: modelopt's algorithm "max".

In: the matrices that read the same input. Out: for each, its codes, block scales and the one global scale they share.
"""

from collections.abc import Mapping

import torch

from mtpress.formats import nvfp4


def weight_amax(weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 scalar: the largest |w| over all matrices of the group; infinite or NaN where one of them holds such a number."""
    return torch.stack([nvfp4.amax(weight) for weight in weights.values()]).max()


def round_group(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Matrix name → {weight, weight_scale, weight_scale_2} for the linears that share one global scale."""
    amax = weight_amax(weights)
    # on the CPU: GPUs divide by a constant as a product with its reciprocal, which is not the same bit for bit
    scale_2 = nvfp4.global_scale(amax.cpu()).to(amax.device)
    rounded = {}
    for name, weight in weights.items():
        packed, scales = nvfp4.quantize(weight, scale_2)
        rounded[name] = {nvfp4.WEIGHT: packed, nvfp4.SCALE: scales, nvfp4.SCALE_2: scale_2}
    return rounded
