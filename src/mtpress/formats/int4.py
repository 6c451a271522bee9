"""INT4: codes 0…15 around the zero point 8, a FP16 scale for each 128 of them along K (AutoRound's layout auto_round:auto_gptq).

In: codes and scales of a matrix [N, K]. Out: the three tensors that GPTQ kernels read, transposed, eight codes to a word:
    qweight int32 [K/8, N]      code of row k in bits 4·(k mod 8) of word k // 8
    qzeros  int32 [K/128, N/8]  the zero point less one (0x77777777), as GPTQ has stored it since its first version
    scales  fp16  [K/128, N]    may be negative: a group then reaches 8·|scale| upwards instead of downwards
and back, and the quantization config. Leaves out: how scales and codes are chosen (rounding/), and where the tensors go.

Bit for bit auto-round 0.16.1's packing (auto_round_extension/torch/qlinear_torch_zp.py, pack_248_bits); its own layout
without GPTQ (auto_round_extension/torch/qlinear_torch.py) stores the zero point itself, 0x88888888. Both are read here.
    w = (code − 8) · scale, exact in float32: a code has 4 bits, a FP16 scale 11
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch

from mtpress.errors import InputError
from mtpress.formats import int4_kernel

GROUP_SIZE = 128
ROWS_MULTIPLE = 32  # N: auto-round allocates qzeros by 32 rows, and Marlin, Exllama and vLLM's CPU kernel want as much
ZERO = 8  # the code of 0
MIN_CODE, MAX_CODE = -8, 7  # code − ZERO
PER_WORD = 8
STORED_LESS_ONE, STORED_AS_IS = 7, 8  # what qzeros holds of the zero point 8, by convention
EAGER = "eager"  # the kernel that is none: these functions themselves
PIECE_CODES = 2 << 20  # packed at a time: the copies stay in the cache

QWEIGHT, QZEROS, SCALES = "qweight", "qzeros", "scales"
QUANT_METHOD, PACKING_FORMAT = "auto-round", "auto_round:auto_gptq"

assert sys.byteorder == "little"  # eight bytes of codes are read as one word


def kernel() -> str:
    """What rounds and packs on this machine's CPU: "avx512", "avx2", "generic" (compiled, plain C) or "eager" (PyTorch)."""
    return int4_kernel.KERNELS[0] if int4_kernel.KERNELS else EAGER


def output_tensors(shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix → (safetensors dtype, shape) of what a linear of shape [N, K] becomes."""
    n, k = shape
    return {
        QWEIGHT: ("I32", (k // PER_WORD, n)),
        QZEROS: ("I32", (k // GROUP_SIZE, n // PER_WORD)),
        SCALES: ("F16", (k // GROUP_SIZE, n)),
    }


def tensors(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Suffix → tensor as stored, of codes uint8 [N, K] (0…15) and scales fp16 [N, K/128]."""
    return {QWEIGHT: pack(codes), QZEROS: zeros(codes.shape[0], scales.shape[1]), SCALES: scales.t().contiguous()}


def pack(codes: torch.Tensor, by: str | None = None) -> torch.Tensor:
    """qweight int32 [K/8, N] of codes uint8 [N, K], 0…15; N is at least 1.

    by: a kernel's name; without it the fastest that takes them. The bits are the same.
    """
    n, k = codes.shape
    codes = codes.contiguous()
    by = by or (kernel() if codes.device.type == "cpu" else EAGER)
    if by != EAGER:
        return int4_kernel.pack(codes, by)
    words = torch.empty(n, k // PER_WORD, dtype=torch.int32, device=codes.device)
    rows = max(1, PIECE_CODES // k)
    for start in range(0, n, rows):
        eight = codes[start : start + rows].view(torch.int64)  # a code a byte; then two, four, eight in a row
        eight = (eight | eight >> 4) & 0x00FF00FF00FF00FF
        eight = (eight | eight >> 8) & 0x0000FFFF0000FFFF
        words[start : start + rows] = eight | eight >> 16  # the lower half stays
    return words.t().contiguous()


def unpack(qweight: torch.Tensor) -> torch.Tensor:
    """codes uint8 [N, K] of qweight int32 [K/8, N]."""
    words, n = qweight.shape
    codes = torch.empty(n, words * PER_WORD, dtype=torch.uint8, device=qweight.device)
    rows = max(1, PIECE_CODES // (words * PER_WORD))
    for start in range(0, n, rows):
        eight = qweight[:, start : start + rows].t().contiguous().to(torch.int64) & 0xFFFFFFFF
        eight = (eight | eight << 16) & 0x0000FFFF0000FFFF
        eight = (eight | eight << 8) & 0x00FF00FF00FF00FF
        eight = (eight | eight << 4) & 0x0F0F0F0F0F0F0F0F
        codes[start : start + rows] = eight.view(torch.uint8)
    return codes


def nearest_codes(scaled: torch.Tensor) -> torch.Tensor:
    """codes uint8 of float32 numbers that are already divided by their scales; ties to even. Not of NaN."""
    return scaled.round().clamp_(MIN_CODE, MAX_CODE).add_(ZERO).to(torch.uint8)


def zeros(n: int, num_groups: int, stored: int = STORED_LESS_ONE) -> torch.Tensor:
    """qzeros int32 [num_groups, N/8] of a symmetric matrix of N rows; stored: 7 by GPTQ's first version, 8 by auto-round's own."""
    word = sum(stored << 4 * place for place in range(PER_WORD))
    return torch.full((num_groups, n // PER_WORD), word - (word >> 31 << 32), dtype=torch.int32)


def zero_points(qzeros: torch.Tensor) -> torch.Tensor:
    """uint8 [K/128, N] of qzeros int32 [K/128, N/8]: what is stored where all of it is the symmetric 8, else one more (GPTQ v1).

    A checkpoint does not say which convention it has. Symmetric ones show it: 8 is the middle of the range, and stored less
    one it is 7. What is neither is read as GPTQ's kernels read it.
    """
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=qzeros.device)
    stored = (qzeros.unsqueeze(-1) >> shifts & 0xF).to(torch.uint8).flatten(-2)
    return stored if bool((stored == STORED_AS_IS).all()) else stored + 1


def dequantize(qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [N, K] of the stored tensors: (code − zero point) · scale, exact; the group size follows from the shapes.

    InputError where the three shapes do not belong together.
    """
    words, n = qweight.shape
    groups = scales.shape[0]
    if scales.shape != (groups, n) or qzeros.shape != (groups, n // PER_WORD) or n % PER_WORD or not groups or words * PER_WORD % groups:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in ((QWEIGHT, qweight), (QZEROS, qzeros), (SCALES, scales)))
        raise InputError(f"{shapes}: are of no one INT4 matrix in GPTQ layout")
    zero, scale = zero_points(qzeros).t().float(), scales.t().float()
    codes = unpack(qweight).view(n, groups, -1)
    weight = torch.empty(codes.shape, device=codes.device)
    rows = max(1, PIECE_CODES // (words * PER_WORD))
    for start in range(0, n, rows):
        piece = slice(start, start + rows)
        weight[piece] = codes[piece].float().sub_(zero[piece].unsqueeze(-1)).mul_(scale[piece].unsqueeze(-1))
    return weight.view(n, words * PER_WORD)


def quantization_config(kept: Iterable[str], blocks: str, **tuning: Any) -> dict[str, Any]:
    """config.json's quantization_config and the whole of quantization_config.json, with the keys of auto-round 0.16.1's export.

    kept: modules in BF16, by their names in the checkpoint. blocks: the prefix of the modules that are quantized. tuning:
    what auto-round writes of how it was rounded, where that is not its default (iters). Its `autoround_version` is left out:
    this is not its output, and neither vLLM 0.32 nor transformers 5 reads it.
    """
    return {
        "bits": 4,
        "data_type": "int",
        "group_size": GROUP_SIZE,
        "sym": True,
        **tuning,
        "block_name_to_quantize": blocks,
        "quant_method": QUANT_METHOD,
        "packing_format": PACKING_FORMAT,
        "extra_config": {module: {"bits": 16, "data_type": "fp"} for module in kept},
    }
