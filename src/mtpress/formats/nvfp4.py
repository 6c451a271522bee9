"""NVFP4: E2M1 codes in blocks of 16 along K, an FP8 E4M3 scale a block, one float32 scale a tensor (modelopt's layout).

In: a BF16 matrix [N, K] and a global scale. Out: packed codes uint8 [N, K/2] (even column in the low nibble) and block
scales float8_e4m3fn [N, K/16]. Leaves out: how the global scale is chosen (rounding/), and where the tensors go.

Arithmetic, bit for bit modelopt 0.47's "max" (torch/quantization/qtensor/nvfp4_tensor.py), all in float32:
    scale_2 = g / (6·448), g the amax over all linears that read the same input
    scale   = E4M3(clamp(amax16 / (6·scale_2), 2⁻⁹, 448)), where amax16 is zero: E4M3(1)
    code    = nearest E2M1 of w / (float32(scale)·scale_2); ties to the even code; above 6 saturates; sign from w < 0
Where modelopt goes wrong mtpress does not follow: for matrices of zeros it writes scale_2 0, NaN block scales and codes 7
(measured), here scale_2 is 1 / (6·448), block scales 1 and codes 0.

The functions below define the arithmetic and run on any device. A compiled kernel gives the same bits of a BF16 matrix on
the CPU (nvfp4_packing.py); `amax` and `quantize` use it where it is installed.
"""

from typing import Any

import torch

from mtpress.formats import nvfp4_packing

GROUP_SIZE = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_SUBNORMAL = 2.0**-9
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# A value above BOUNDS[i] takes at least code i+1; on the bound itself only where i is odd, so that ties go to even codes.
BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
ROWS_BYTES = 32 << 20  # float32 working set: rows are quantized in pieces of about this size
EAGER = "eager"  # the kernel that is none: these functions themselves

# vLLM reads hf_quant_config.json only where the producer is modelopt, whose layout this is; mtpress.json says who made it.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}

WEIGHT, SCALE, SCALE_2, INPUT_SCALE = "weight", "weight_scale", "weight_scale_2", "input_scale"


def output_tensors(shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix → (safetensors dtype, shape) of what a linear of shape [N, K] becomes."""
    n, k = shape
    return {
        WEIGHT: ("U8", (n, k // 2)),
        SCALE: ("F8_E4M3", (n, k // GROUP_SIZE)),
        SCALE_2: ("F32", ()),
        INPUT_SCALE: ("F32", ()),
    }


def kernel() -> str:
    """What packs a BF16 matrix on this machine's CPU: "avx512", "avx2", "generic" (compiled, plain C) or "eager" (PyTorch)."""
    return nvfp4_packing.KERNELS[0] if nvfp4_packing.KERNELS else EAGER


def amax(weight: torch.Tensor, by: str | None = None) -> torch.Tensor:
    """float32 scalar: the largest |w| of a matrix; infinite or NaN where one of its numbers is, so one look tells both.

    by: a kernel's name; without it the fastest that takes the matrix.
    """
    by = by or (kernel() if nvfp4_packing.takes(weight) else EAGER)
    if by != EAGER:
        return nvfp4_packing.amax(weight, by)
    least, most = torch.aminmax(weight.view(-1))
    return most.float().maximum(-least.float())


def global_scale(amax: torch.Tensor) -> torch.Tensor:
    """weight_scale_2 or input_scale, float32 scalar, of an amax: amax / (6·448), as if it were 1 where that is zero."""
    scale = amax.float() / (E2M1_MAX * E4M3_MAX)
    return torch.where(scale == 0, 1 / (E2M1_MAX * E4M3_MAX), scale)


def block_scales(weight: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [N, K/16] of a matrix [N, K] under its global scale."""
    n, k = weight.shape
    amax = weight.view(n, k // GROUP_SIZE, GROUP_SIZE).abs().amax(dim=-1).float()
    scale = amax / (E2M1_MAX * scale_2)
    scale[scale == 0] = 1.0
    return scale.clamp(min=E4M3_MIN_SUBNORMAL, max=E4M3_MAX).to(torch.float8_e4m3fn)


def encode(scaled: torch.Tensor) -> torch.Tensor:
    """E2M1 codes uint8 (0…15) of float32 values that are already divided by their scales."""
    size = scaled.abs()
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for i, bound in enumerate(BOUNDS):
        code += (size >= bound) if i % 2 else (size > bound)
    return code + ((scaled < 0).to(torch.uint8) << 3)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K] codes → uint8 [N, K/2], even column in the low nibble."""
    return (codes[..., 1::2] << 4) | codes[..., 0::2]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K/2] → codes uint8 [N, K]."""
    return torch.stack([packed & 0x0F, packed >> 4], dim=-1).flatten(-2)


def quantize(
    weight: torch.Tensor, scale_2: torch.Tensor, by: str | None = None, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed codes uint8 [N, K/2], block scales float8_e4m3fn [N, K/16]) of a matrix [N, K] under a float32 global scale.

    by: a kernel's name; without it the fastest that takes the matrix. The bits are the same.
    scales: block scales that somebody chose (rounding/); without them the largest magnitude of each block becomes ±6.
    """
    by = by or (kernel() if nvfp4_packing.takes(weight) else EAGER)
    return _quantize_eagerly(weight, scale_2, scales) if by == EAGER else nvfp4_packing.quantize(weight, scale_2, by, scales)


def _quantize_eagerly(weight: torch.Tensor, scale_2: torch.Tensor, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """quantize in PyTorch, in pieces of rows."""
    n, k = weight.shape
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // GROUP_SIZE, dtype=torch.float8_e4m3fn, device=weight.device) if given is None else given
    rows = max(1, ROWS_BYTES // (4 * k))
    for start in range(0, n, rows):
        piece = weight[start : start + rows]
        scale = block_scales(piece, scale_2) if given is None else given[start : start + rows]
        step = (scale.float() * scale_2).unsqueeze(-1)
        scaled = piece.view(-1, k // GROUP_SIZE, GROUP_SIZE) / step
        packed[start : start + rows] = pack(encode(scaled.view(-1, k)))
        scales[start : start + rows] = scale
    return packed, scales


def dequantize(packed: torch.Tensor, scales: torch.Tensor, scale_2: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of packed codes, block scales and global scale."""
    n, half = packed.shape
    pairs = decode(unpack(torch.arange(256, dtype=torch.uint8, device=packed.device).view(256, 1)))  # a byte at a time: 4 times as fast
    values = pairs.index_select(0, packed.reshape(-1).int()).view(n, 2 * half // GROUP_SIZE, GROUP_SIZE)
    return values.mul_((scales.float() * scale_2.float()).unsqueeze(-1)).view(n, 2 * half)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of E2M1 codes uint8 (0…15)."""
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], device=codes.device)
    return table[codes.int()]


def round_activations(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """x [..., K] as a W4A4 kernel sees it: rounded to NVFP4 with dynamic block scales under the static input_scale, and back."""
    return round_under(x, 1.0 / input_scale.float())


def round_under(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """round_activations by the reciprocal of input_scale, float32 scalar: what compressed-tensors stores as input_global_scale.

    Source: vLLM 0.32, quantization/utils/nvfp4_emulation_utils.py, ref_nvfp4_quant_dequant.
    """
    blocks = x.float().reshape(*x.shape[:-1], -1, GROUP_SIZE)
    scale = (global_scale * (blocks.abs().amax(dim=-1, keepdim=True) * (1.0 / E2M1_MAX))).clamp(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float()
    step = scale * (1.0 / global_scale)
    inverse = torch.where(step == 0, 0.0, 1.0 / step)
    codes = encode((blocks * inverse).clamp(-E2M1_MAX, E2M1_MAX))
    return (decode(codes) * (scale / global_scale)).reshape(x.shape).to(x.dtype)


def quantization_config(ignore: list[str], kv_cache_fp8: bool) -> dict[str, Any]:
    """config.json's quantization_config, as modelopt 0.47 exports it."""
    number = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": GROUP_SIZE}
    config: dict[str, Any] = {
        "config_groups": {"group_0": {"input_activations": number, "weights": dict(number), "targets": ["Linear"]}},
        "ignore": ignore,
        "quant_algo": "NVFP4",
        "producer": dict(PRODUCER),
        "quant_method": "modelopt",
    }
    if kv_cache_fp8:
        config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return config


def hf_quant_config(exclude_modules: list[str], kv_cache_fp8: bool) -> dict[str, Any]:
    """hf_quant_config.json, as modelopt 0.47 exports it."""
    return {
        "producer": dict(PRODUCER),
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8" if kv_cache_fp8 else None,
            "group_size": GROUP_SIZE,
            "exclude_modules": exclude_modules,
        },
    }
