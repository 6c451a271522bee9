"""A vLLM plugin: NVFP4 checkpoints of modelopt on vLLM's CPU platform, for acceptance tests without a GPU.

In: vLLM's table of NVFP4 kernels, which has no entry for the CPU. Out: the table with vLLM's own emulation in it (weights
dequantized, activations rounded to FP4 and back), so the numerics are those of W4A4 and only the speed is not. The emulation
dequantizes every weight at every step; where memory allows, what it makes of one is kept (the same numbers, several times as fast).
Weight-only NVFP4 (W4A16) vLLM forces to Marlin before it reads the table; there modelopt's linears are handed the same emulation, which
rounds no activations where a linear has no input scale. Leaves out: FP8, for which vLLM has CPU kernels. Read in vLLM 0.32.

vLLM calls `register` in each process it starts (entry point group vllm.general_plugins), possibly more than once.
"""

import logging
from typing import Any

logger = logging.getLogger("vllm.plugins.mtpress_nvfp4_cpu")

HELD = "mtpress_dequantized"
MEMORY_SHARE = 64  # a weight is kept while this many of its size are available: 11 GB for the largest of a 27B model
GROUP_SIZE = 16


def register() -> None:
    """Registers the emulation for the CPU, where it is needed and possible; on other platforms nothing changes."""
    try:
        from vllm.platforms import PlatformEnum, current_platform

        if current_platform._enum != PlatformEnum.CPU:
            return
        from vllm.model_executor.kernels import linear
        from vllm.model_executor.layers.quantization import modelopt

        table = linear._POSSIBLE_NVFP4_KERNELS
        kernel = holding(linear.EmulationNvFp4LinearKernel)
    except (ImportError, AttributeError) as error:
        logger.debug("this vLLM has no table of NVFP4 kernels to extend: %s", error)
        return
    if not table.get(PlatformEnum.CPU):
        table[PlatformEnum.CPU] = [kernel]
        modelopt.init_nvfp4_linear_kernel = weight_only(kernel, modelopt.init_nvfp4_linear_kernel, linear.NvFp4LinearLayerConfig)
        logger.debug("registered %s for the CPU", kernel.__name__)


def weight_only(kernel: Any, choose: Any, config: Any) -> Any:
    """vLLM's choice of a kernel, but for W4A16, which it would force to Marlin."""

    def chosen(use_a16: bool = False) -> Any:
        return kernel(config()) if use_a16 else choose()

    return chosen


def holding(emulation: Any) -> Any:
    """The emulation as a class that keeps dequantized weights; the emulation itself where this vLLM has other parts inside."""
    try:
        import psutil
        import torch
        from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype, ref_nvfp4_quant_dequant
    except ImportError as error:
        logger.debug("this vLLM emulates NVFP4 in another way: %s", error)
        return emulation

    class HoldingEmulation(emulation):  # type: ignore[misc]
        """run_nvfp4_emulations of vLLM, with the weight's half done once; without the activations' half for W4A16."""

        def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
            held = getattr(layer, HELD, None)
            if held is None or held.dtype != x.dtype:
                packed = layer.weight.data.view(torch.uint8)
                scales = layer.weight_scale.data
                held = dequantize_to_dtype(packed, scales, layer.weight_global_scale, x.dtype, GROUP_SIZE, swizzle=False)
                if held.nbytes * MEMORY_SHARE <= psutil.virtual_memory().available:
                    object.__setattr__(layer, HELD, held)  # not a buffer of the module: it is no part of the checkpoint
            scale = getattr(layer, "input_global_scale_inv", None)
            rounded = x if scale is None else ref_nvfp4_quant_dequant(x, scale, block_size=GROUP_SIZE)
            out = torch.matmul(rounded, held.t())
            return out if bias is None else out + bias

    return HoldingEmulation
