"""A vLLM plugin: NVFP4 W4A4 checkpoints on vLLM's CPU platform, for acceptance tests without a GPU.

In: vLLM's table of NVFP4 kernels, which has no entry for the CPU. Out: the table with vLLM's own emulation in it (weights
dequantized, activations rounded to FP4 and back), so the numerics are those of W4A4 and only the speed is not. Leaves
out: weight-only NVFP4 (W4A16), which vLLM forces to Marlin before it reads the table. Read in vLLM 0.32.

vLLM calls `register` in each process it starts (entry point group vllm.general_plugins), possibly more than once.
"""

import logging

logger = logging.getLogger("vllm.plugins.mtpress_nvfp4_cpu")


def register() -> None:
    """Registers the emulation for the CPU, where it is needed and possible; on other platforms nothing changes."""
    try:
        from vllm.platforms import PlatformEnum, current_platform

        if current_platform._enum != PlatformEnum.CPU:
            return
        from vllm.model_executor.kernels import linear

        kernel = linear.EmulationNvFp4LinearKernel
        table = linear._POSSIBLE_NVFP4_KERNELS
    except (ImportError, AttributeError) as error:
        logger.debug("this vLLM has no table of NVFP4 kernels to extend: %s", error)
        return
    if not table.get(PlatformEnum.CPU):
        table[PlatformEnum.CPU] = [kernel]
        logger.debug("registered %s for the CPU", kernel.__name__)
