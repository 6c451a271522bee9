"""A vLLM plugin: INT4 checkpoints (AutoRound, GPTQ) on vLLM's CPU platform, as W4A16 on every processor.

What vLLM 0.32 does with them depends on the processor. With AMX it rounds activations to 8 bits (W4A8), which no GPU does with such a
checkpoint: here VLLM_CPU_INT4_W4A8 is 0 unless the environment says otherwise. Without AVX-512 its build has no INT4 kernel at all and
dies at the first request: here weights are dequantized when they are loaded, and multiplied in the dtype of the activations. Leaves out:
stored zero points, other platforms. Harmless where the kernel is there.

vLLM calls `register` in each process it starts, possibly more than once.
"""

import logging
import os
from functools import wraps
from typing import Any

logger = logging.getLogger("vllm.plugins.mtpress_int4_cpu")

KERNEL = "cpu_gemm_wna16"  # in torch.ops._C, once vLLM has loaded its library for this processor
MIDDLE = 8  # the code of zero


def register() -> None:
    """Sets the variable and wraps the kernel's class, on the CPU only."""
    try:
        from vllm.platforms import PlatformEnum, current_platform

        if current_platform._enum != PlatformEnum.CPU:
            return
        from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel as Kernel

        load, apply = Kernel.process_weights_after_loading, Kernel.apply_weights
    except (ImportError, AttributeError) as error:
        logger.debug("this vLLM multiplies INT4 in another way: %s", error)
        return
    os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
    if not hasattr(load, "__wrapped__"):
        Kernel.process_weights_after_loading = dequantizing(load)
        Kernel.apply_weights = multiplying(apply)


def dequantizing(load: Any) -> Any:
    """vLLM's process_weights_after_loading; where there is no kernel, the packed weight becomes a matrix [N, K]."""

    @wraps(load)
    def loaded(kernel: Any, layer: Any) -> None:
        import torch
        from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

        if hasattr(torch.ops._C, KERNEL) or kernel.config.zero_points:
            load(kernel, layer)
            return
        packed, scales = getattr(layer, kernel.w_q_name), getattr(layer, kernel.w_s_name)
        along_k = packed.data.t() if packed.input_dim == 1 else packed.data  # compressed-tensors stores [N, K / 8]
        codes = unpack_quantized_values_into_int32(along_k, kernel.config.weight_type, 0)
        by_group = (scales.data.t() if scales.output_dim == 0 else scales.data).float()
        weight = (codes - MIDDLE).float().unflatten(0, (len(by_group), -1)) * by_group.unsqueeze(1)
        packed.data = weight.flatten(0, 1).to(scales.dtype).t().contiguous()

    return loaded


def multiplying(apply: Any) -> Any:
    """vLLM's apply_weights, for what `dequantizing` made."""

    @wraps(apply)
    def applied(kernel: Any, layer: Any, x: Any, bias: Any = None) -> Any:
        import torch

        if hasattr(torch.ops._C, KERNEL) or kernel.config.zero_points:
            return apply(kernel, layer, x, bias)
        return torch.nn.functional.linear(x, getattr(layer, kernel.w_q_name), bias)

    return applied
