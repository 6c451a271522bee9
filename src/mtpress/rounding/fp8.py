"""FP8 of the linears that read one input: one scale for all of them, codes by rounding to nearest.

In: the matrices of a group. Out: for each, its codes and the scale they share.

modelopt 0.47 leaves every FP8 linear its own scale (unified_export_hf.py, _fuse_shared_input_modules, passes over FP8). vLLM 0.32 has
one a fused linear: where the scales differ it takes the largest, and rounds the codes of the other shards, already rounded, a second
time (modelopt.py, KFp8StaticTensor.process). With the largest taken here, every weight is rounded once.
"""

from collections.abc import Mapping

import torch

from mtpress.formats import fp8
from mtpress.rounding.max import weight_amax


def round_group(weights: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Matrix name → {weight, weight_scale} for the linears that share one scale; it is not finite where a weight is not."""
    amax = weight_amax(weights)
    scale = fp8.scale(amax.cpu()).to(amax.device)  # on the CPU, as in rounding/max.py
    return {name: {fp8.WEIGHT: fp8.quantize(weight, scale), fp8.SCALE: scale} for name, weight in weights.items()}
