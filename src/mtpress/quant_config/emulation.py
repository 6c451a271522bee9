"""The linears of a stored checkpoint as vLLM computes them, in plain PyTorch: one small entry a format.

In: the stored tensors of a module and of those that vLLM fuses it with. Out: an `EmulatedLinear`: the weight that the kernel
multiplies with, and what it does to its input. Leaves out: which module is stored how (bodies.py), and speed.

    NVFP4 W4A4    weight: codes · (block scale · weight_scale_2) in float32, then the dtype of the activations. Input rounded to
                  NVFP4 under input_scale (formats/nvfp4.py). vLLM 0.32, utils/nvfp4_emulation_utils.py
    NVFP4 W4A16   the same weight, inputs as they are
    INT4 W4A16    weight: (code − zero point) · scale, scale and product in the dtype of the activations, as vLLM keeps them
    FP8           inputs and weights in E4M3, their product times both scales, of weights one a tensor or a row. Input scale static, or
                  per token where none is stored. Where the config leaves activations in 16 bits, weights are dequantized
    FP8 in blocks weights with a scale for 128×128 of them, inputs for 128 of a token, dynamic; products and sums in float32

Fused linears (q, k and v; gate and up; …) have one scale for all in vLLM: the largest stored weight_scale_2 and input_scale, or
of compressed-tensors' reciprocals the largest too (modelopt.py, compressed_tensors_w4a4_nvfp4.py). So do they here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.formats import fp8, int4, nvfp4
from mtpress.formats.fp8 import to_e4m3
from mtpress.quant_config.stored import (
    GLOBAL_SCALE,
    INPUT_GLOBAL_SCALE,
    INPUT_SCALE,
    NVFP4_GROUP_SIZE,
    QWEIGHT,
    QZEROS,
    SCALE,
    SCALE_2,
    SCALE_INV,
    SCALES,
    WEIGHT,
    WEIGHT_PACKED,
    ZERO_POINT,
    Form,
)  # fmt: skip

Parts = Mapping[str, Tensor]  # the tensors of a module by the last part of their names
Rounding = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # an input → what the kernel multiplies with, and what it scales by after
PIECE_BYTES = 32 << 20  # float32 working set of rounding
INT4_BITS = 4
FP8_BLOCK = 128
FP8_LEAST_SCALE = 1 / (448 * 512)  # vLLM 0.32, input_quant_fp8.py


class EmulatedLinear(nn.Module):
    """A linear without bias. weight [N, K]; rounding: of the input, None where the kernel takes it as it is."""

    def __init__(self, weight: Tensor, rounding: Rounding | None = None, output_scale: Tensor | None = None) -> None:
        super().__init__()
        self.matrix, self.rounding, self.output_scale = weight, rounding, output_scale  # no parameter: none is loaded into it

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding is None:
            return F.linear(x, self.matrix)
        rounded, scale = self.rounding(x)
        out = F.linear(rounded, self.matrix)
        if scale is None or self.output_scale is None:
            return out
        return (out.float() * (scale * self.output_scale)).to(x.dtype)


class BlockFP8Linear(EmulatedLinear):
    """codes float8_e4m3fn [N, K] and their scales, float32, one for FP8_BLOCK rows and columns."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__(codes)
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        rounded = round_by_groups(x)
        rows = FP8_BLOCK * max(1, PIECE_BYTES // (4 * FP8_BLOCK * self.matrix.shape[1]))
        made = [F.linear(rounded, self.rows(start, start + rows)).to(x.dtype) for start in range(0, len(self.matrix), rows)]
        return torch.cat(made, -1)

    def rows(self, start: int, stop: int) -> Tensor:
        """float32: rows start to stop of the weight; start is a multiple of FP8_BLOCK."""
        scales = self.scales[start // FP8_BLOCK : -(-stop // FP8_BLOCK)].repeat_interleave(FP8_BLOCK, 1)
        codes = self.matrix[start:stop].float()
        return codes * scales.repeat_interleave(FP8_BLOCK, 0)[: len(codes)]


def round_by_groups(x: Tensor) -> Tensor:
    """float32: each FP8_BLOCK numbers of a token to E4M3 under a scale of their own, and back."""
    groups = x.float().view(*x.shape[:-1], -1, FP8_BLOCK)
    steps = (groups.abs().amax(-1, keepdim=True) / nvfp4.E4M3_MAX).clamp(min=FP8_LEAST_SCALE)
    codes = (groups / steps).clamp(-nvfp4.E4M3_MAX, nvfp4.E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * steps).view(x.shape)


@dataclass(frozen=True)
class Emulation:
    """make(its tensors, those of all that it is fused with, whether activations are quantized, dtype) → the linear.

    parts: what must be stored; problem(infos, [N, K]) → why these tensors cannot be emulated, None where they can.
    """

    parts: tuple[str, ...]
    make: Callable[[Parts, Sequence[Parts], bool, torch.dtype], EmulatedLinear]
    problem: Callable[[Mapping[str, TensorInfo], tuple[int, int]], str | None]


def _largest(group: Sequence[Parts], suffix: str) -> Tensor:
    """float32 scalar: the largest of what the fused linears store."""
    return torch.stack([parts[suffix].float().max() for parts in group if suffix in parts]).max()


def in_rows(function: Callable[..., Tensor], *matrices: Tensor, columns: int) -> Tensor:
    """function of matrices [N, …], a few rows at a time, so that its float32 copies stay small. columns: of the result."""
    rows = max(1, PIECE_BYTES // (4 * columns))
    if len(matrices[0]) <= rows:
        return function(*matrices)
    return torch.cat([function(*(m[start : start + rows] for m in matrices)) for start in range(0, len(matrices[0]), rows)])


def _nvfp4_weight(codes: Tensor, scales: Tensor, scale_2: Tensor, dtype: torch.dtype) -> Tensor:
    return in_rows(lambda c, s: nvfp4.dequantize(c, s, scale_2).to(dtype), codes, scales, columns=2 * codes.shape[1])


def _rounded(x: Tensor, global_scale: Tensor) -> tuple[Tensor, None]:
    flat = x.reshape(-1, x.shape[-1])
    return in_rows(lambda rows: nvfp4.round_under(rows, global_scale), flat, columns=x.shape[-1]).view(x.shape), None


def _modelopt_nvfp4(parts: Parts, group: Sequence[Parts], activations: bool, dtype: torch.dtype) -> EmulatedLinear:
    weight = _nvfp4_weight(parts[WEIGHT], parts[SCALE], _largest(group, SCALE_2), dtype)
    if not activations:
        return EmulatedLinear(weight)
    global_scale = 1.0 / _largest(group, INPUT_SCALE)
    return EmulatedLinear(weight, lambda x: _rounded(x, global_scale))


def _compressed_nvfp4(parts: Parts, group: Sequence[Parts], activations: bool, dtype: torch.dtype) -> EmulatedLinear:
    weight = _nvfp4_weight(parts[WEIGHT_PACKED], parts[SCALE], 1.0 / _largest(group, GLOBAL_SCALE), dtype)
    if not activations:
        return EmulatedLinear(weight)
    global_scale = _largest(group, INPUT_GLOBAL_SCALE)
    return EmulatedLinear(weight, lambda x: _rounded(x, global_scale))


def _int4_weight(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, K] of codes uint8 [N, K], zero points uint8 [N, groups] and scales [N, groups]."""

    def product(code: Tensor, zero: Tensor, scale: Tensor) -> Tensor:
        grouped = code.view(*scale.shape, -1).to(dtype) - zero.to(dtype).unsqueeze(-1)  # small integers: exact
        return (grouped * scale.to(dtype).unsqueeze(-1)).view(code.shape)

    return in_rows(product, codes, zeros, scales, columns=codes.shape[1])


def _gptq(parts: Parts, group: Sequence[Parts], activations: bool, dtype: torch.dtype) -> EmulatedLinear:
    zeros = int4.zero_points(parts[QZEROS]).t()
    return EmulatedLinear(_int4_weight(int4.unpack(parts[QWEIGHT]), zeros, parts[SCALES].t(), dtype))


def _compressed_int4(parts: Parts, group: Sequence[Parts], activations: bool, dtype: torch.dtype) -> EmulatedLinear:
    scales = parts[SCALE]
    codes = int4.unpack(parts[WEIGHT_PACKED].t().contiguous())
    stored = parts.get(ZERO_POINT)
    zeros = int4.unpack(stored.contiguous()).t() if stored is not None else torch.full_like(scales, int4.ZERO, dtype=torch.uint8)
    return EmulatedLinear(_int4_weight(codes, zeros, scales, dtype))


def _fp8(parts: Parts, group: Sequence[Parts], activations: bool, dtype: torch.dtype) -> EmulatedLinear:
    weight, scale = parts[WEIGHT], parts[SCALE].float()
    if not activations:  # each shard of a fused linear keeps its own scale
        return EmulatedLinear(fp8.to_bf16(weight, scale)[0].to(dtype))
    if scale.numel() == 1 and len(group) > 1:  # vLLM rounds fused matrices again, under the largest of their scales
        shared = _largest(group, SCALE)
        if any(bool(member[SCALE].float().max() != shared) for member in group):
            weight = in_rows(lambda w: to_e4m3(w.float() * scale.reshape(()), shared), weight, columns=weight.shape[1])
        scale = shared
    output_scale = scale.reshape(-1) if scale.numel() > 1 else scale.reshape(())
    static = _largest(group, INPUT_SCALE) if INPUT_SCALE in parts else None

    def rounding(x: Tensor) -> tuple[Tensor, Tensor]:
        step = static if static is not None else (x.float().abs().amax(-1, keepdim=True) / nvfp4.E4M3_MAX).clamp(min=FP8_LEAST_SCALE)
        return to_e4m3(x, step).to(dtype), step  # E4M3 has no more bits than dtype

    return EmulatedLinear(weight.to(dtype), rounding, output_scale)


def _block_fp8(parts: Parts, group: Sequence[Parts], activations: bool, dtype: torch.dtype) -> EmulatedLinear:
    weight, stored = parts[WEIGHT], parts.get(SCALE_INV, parts.get(SCALE))
    assert stored is not None
    scales = stored.float().reshape(-(-len(weight) // FP8_BLOCK), -1)
    return BlockFP8Linear(weight, scales) if activations else EmulatedLinear(fp8.to_bf16(weight, scales)[0].to(dtype))


def _no_nvfp4(codes: str, shared: str) -> Callable[[Mapping[str, TensorInfo], tuple[int, int]], str | None]:
    def problem(infos: Mapping[str, TensorInfo], shape: tuple[int, int]) -> str | None:
        n, k = shape
        if infos[codes].shape != (n, k // 2) or infos[SCALE].shape != (n, k // NVFP4_GROUP_SIZE) or infos[SCALE].dtype != "F8_E4M3":
            return f"its codes {list(infos[codes].shape)} and block scales {list(infos[SCALE].shape)} are not of a matrix {[n, k]}"
        return None if infos[shared].dtype == "F32" else f"its {shared} is {infos[shared].dtype}, must be F32"

    return problem


def _no_gptq(infos: Mapping[str, TensorInfo], shape: tuple[int, int]) -> str | None:
    n, k = shape
    groups = infos[SCALES].shape[0] if infos[SCALES].shape else 0
    if infos[QWEIGHT].shape != (k * INT4_BITS // 32, n) or infos[SCALES].shape[1:] != (n,) or not groups or k % groups:
        return f"its qweight {list(infos[QWEIGHT].shape)} is not of a 4-bit matrix {[n, k]} in GPTQ's layout"
    return None


def _no_compressed_int4(infos: Mapping[str, TensorInfo], shape: tuple[int, int]) -> str | None:
    n, k = shape
    groups = infos[SCALE].shape[-1] if infos[SCALE].shape else 0
    if infos[WEIGHT_PACKED].shape != (n, k * INT4_BITS // 32) or infos[SCALE].shape != (n, groups) or not groups or k % groups:
        return f"its weight_packed {list(infos[WEIGHT_PACKED].shape)} is not of a 4-bit matrix {[n, k]}"
    return None


def _no_e4m3(weight: TensorInfo, shape: tuple[int, int]) -> str | None:
    if weight.shape == shape and weight.dtype == "F8_E4M3":
        return None
    return f"its weight is {weight.dtype} {list(weight.shape)}, must be F8_E4M3 {list(shape)}"


def _no_fp8(infos: Mapping[str, TensorInfo], shape: tuple[int, int]) -> str | None:
    if problem := _no_e4m3(infos[WEIGHT], shape):
        return problem
    return None if infos[SCALE].num_params in (1, shape[0]) else f"its weight_scale {list(infos[SCALE].shape)} is not one a tensor or a row"


def _no_block_fp8(infos: Mapping[str, TensorInfo], shape: tuple[int, int]) -> str | None:
    n, k = shape
    if problem := _no_e4m3(infos[WEIGHT], shape):
        return problem
    name = SCALE_INV if SCALE_INV in infos else SCALE
    rows, columns = -(-n // FP8_BLOCK), k // FP8_BLOCK
    if k % FP8_BLOCK or infos[name].shape not in ((rows, columns), (rows, 1, columns, 1)):
        return f"its {name} {list(infos[name].shape)} is not of blocks of {FP8_BLOCK}×{FP8_BLOCK} of a matrix {[n, k]}"
    return None


EMULATIONS: dict[Form, Emulation] = {
    "nvfp4": Emulation((WEIGHT, SCALE, SCALE_2), _modelopt_nvfp4, _no_nvfp4(WEIGHT, SCALE_2)),
    "nvfp4-pack-quantized": Emulation((WEIGHT_PACKED, SCALE, GLOBAL_SCALE), _compressed_nvfp4, _no_nvfp4(WEIGHT_PACKED, GLOBAL_SCALE)),
    "gptq": Emulation((QWEIGHT, QZEROS, SCALES), _gptq, _no_gptq),
    "pack-quantized": Emulation((WEIGHT_PACKED, SCALE), _compressed_int4, _no_compressed_int4),
    "fp8": Emulation((WEIGHT, SCALE), _fp8, _no_fp8),
}
BLOCK_FP8 = Emulation((WEIGHT,), _block_fp8, _no_block_fp8)


def emulation_of(form: Form, stored: Mapping[str, TensorInfo] | Parts) -> Emulation | None:
    """What emulates a module of this form that has these tensors; None for 16-bit numbers and what is not emulated.

    Blocks have weight_scale_inv or, in compressed-tensors' and modelopt's layouts, a weight_scale of two sizes that are not 1.
    """
    if form != "fp8":
        return EMULATIONS.get(form)
    scale = stored.get(SCALE)
    in_blocks = SCALE_INV in stored or (scale is not None and WEIGHT in stored and len(scale.shape) > 1 and not _by_row(stored))
    return BLOCK_FP8 if in_blocks else EMULATIONS[form]


def _by_row(stored: Mapping[str, TensorInfo] | Parts) -> bool:
    return tuple(stored[SCALE].shape) in ((1, 1), (stored[WEIGHT].shape[0], 1))


INPUT_SCALES: dict[Form, str] = {"nvfp4": INPUT_SCALE, "nvfp4-pack-quantized": INPUT_GLOBAL_SCALE}
