"""Runs under the engine's python: what vLLM's emulation of NVFP4 makes of activations and of stored weights.

    emulate_on_cpu.py IN.safetensors OUT.safetensors

In: x [T, K]; global_scale; codes, block_scales, weight_scale. Out: "rounded" [T, K], "weight" [N, K] and "out" [T, N], as
run_nvfp4_emulations computes them; "fp8_codes" [T, K] and "fp8_scales" [T, K/128], as FP8 linears in blocks have them of x.
"""

import sys

from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as emulation
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape


def main():
    given = load_file(sys.argv[1])
    x, codes, blocks = given["x"], given["codes"], given["block_scales"]
    made = {
        "rounded": emulation.ref_nvfp4_quant_dequant(x, given["global_scale"], 16),
        "weight": emulation.dequantize_to_dtype(codes, blocks, given["weight_scale"], x.dtype, 16, swizzle=False),
        "out": emulation.run_nvfp4_emulations(x, given["global_scale"], codes, blocks, given["weight_scale"], swizzle=False),
    }
    with set_current_vllm_config(VllmConfig()):
        quantize = QuantFP8(static=False, group_shape=GroupShape(1, 128))
        made["fp8_codes"], made["fp8_scales"] = quantize.forward_native(x)
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, sys.argv[2])


main()
