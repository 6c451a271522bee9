"""Runs under the engine's python: what vLLM's CPU kernel for INT4 makes of stored tensors.

    int4_kernel_on_cpu.py IN.safetensors OUT.safetensors [--without-kernel]

In: qweight, scales of one matrix [N, K] in GPTQ layout. Out: the matrix as the kernel applies it, by multiplying the identity:
"bfloat16" and "float16", [N, K] each, in the dtype that they are named after. --without-kernel: as on a CPU that vLLM has none for.
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import MPLinearLayerConfig
from vllm.platforms import current_platform
from vllm.scalar_type import scalar_types

from mtpress.engine.plugins import int4_cpu

current_platform.import_kernels()
if "--without-kernel" in sys.argv:
    int4_cpu.KERNEL = "no_kernel"
int4_cpu.register()  # as vLLM does with plugins, more than once
int4_cpu.register()


def parameter(tensor, **dims):
    made = torch.nn.Parameter(tensor, requires_grad=False)
    for name, dim in dims.items():
        setattr(made, name, dim)
    return made


def applied(stored, dtype):
    k, n = stored["qweight"].shape[0] * 8, stored["qweight"].shape[1]
    config = MPLinearLayerConfig(
        full_weight_shape=(k, n), partition_weight_shape=(k, n), weight_type=scalar_types.uint4b8, act_type=dtype,
        group_size=k // stored["scales"].shape[0], zero_points=False,
    )  # fmt: skip
    layer = torch.nn.Module()
    layer.qweight = parameter(stored["qweight"].clone(), input_dim=0, output_dim=1, packed_dim=0)
    layer.scales = parameter(stored["scales"].to(dtype), input_dim=0, output_dim=1)
    kernel = CPUWNA16LinearKernel(config, w_q_param_name="qweight", w_s_param_name="scales")
    implemented, reason = kernel.can_implement(config)
    assert implemented, reason
    kernel.process_weights_after_loading(layer)
    return kernel.apply_weights(layer, torch.eye(k, dtype=dtype)).t().contiguous()


def main():
    stored = load_file(sys.argv[1])
    save_file({str(dtype).removeprefix("torch."): applied(stored, dtype) for dtype in (torch.bfloat16, torch.float16)}, sys.argv[2])


main()
