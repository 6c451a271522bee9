"""The oracle: auto-round 0.16.1's plain rounding and its packing, on matrices of a safetensors file.

    .envs/autoround/bin/python tests/oracles/autoround_pack.py IN.safetensors OUT.safetensors

In: NAME.weight, BF16 [N, K], rounded and packed; or float32 with NAME.scale, FP16 [N, K/128], packed under these scales. Out:
NAME.qweight, NAME.qzeros, NAME.scales of the layout auto_round:auto_gptq, NAME.as_is.* of its own layout, and NAME.read and
NAME.as_is.read, float32 [N, K], what its layers multiply by. Runs on the packages of locks/autoround.txt, imports nothing of mtpress.
"""

import sys

import torch
from auto_round.data_type.utils import get_quant_func
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file, save_file

BITS, GROUP_SIZE, ZERO = 4, 128, 8


def main() -> None:
    given = load_file(sys.argv[1])
    rtn, name = get_quant_func("int", BITS, sym=True, disable_opt_rtn=True, group_size=GROUP_SIZE, iters=0)
    assert name == "rtn_int_sym", name
    found: dict[str, torch.Tensor] = {}
    for key in [key for key in given if key.endswith(".weight")]:
        start, weight = key.removesuffix(".weight"), given[key]
        n, k = weight.shape
        scale = given.get(f"{start}.scale")
        if scale is None:
            weight, scale, zero = rtn(weight.clone(), bits=BITS, group_size=GROUP_SIZE, scale_dtype=torch.float16, q_scale_thresh=1e-5)
            assert zero == ZERO
            scale = scale.reshape(n, -1)
        linear = torch.nn.Linear(k, n, bias=False, dtype=weight.dtype)
        linear.weight.data = weight
        for at, layout in ((start, qlinear_torch_zp), (f"{start}.as_is", qlinear_torch)):
            packed = layout.QuantLinear(BITS, GROUP_SIZE, k, n, bias=False)
            packed.pack(linear, scale, ZERO, None, device="cpu")
            found |= {f"{at}.{part}": tensor.contiguous() for part, tensor in packed.state_dict().items()}
            found[f"{at}.read"] = packed(torch.eye(k)).t().contiguous()
    save_file(found, sys.argv[2])


if __name__ == "__main__":
    main()
