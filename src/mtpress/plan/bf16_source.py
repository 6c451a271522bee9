"""A checkpoint in F16, F32 or block-FP8, seen as the BF16 checkpoint that the engine makes of it.

In: an open checkpoint. Out: the same with every weight as BF16: its tensors say so, and whoever reads one gets what it rounds to, a
piece at a time. Leaves out: which of the tensors are quantized then (plan/plan.py).

    F16, F32    rounded to BF16. vLLM 0.32 makes a float32 model BF16 (config/model.py, _resolve_auto_dtype) and holds only A_log in F32:
                that one stays as it is unless BF16 holds it exactly
    block-FP8   BF16(float32(code) · scale), as transformers 5 (integrations/finegrained_fp8.py, Fp8Dequantize); quant_method fp8 with
                weight_block_size, a weight_scale_inv beside each weight
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo, read_tensor
from mtpress.errors import InputError
from mtpress.models import family

WEIGHT, SCALE_INV = ".weight", ".weight_scale_inv"
WIDER = ("F16", "F32")
IN_FLOAT32 = ".A_log"
DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Reading:
    """How a source was read: stored dtype → how many tensors became BF16. Empty where it is BF16 as it is."""

    rounded: Mapping[str, int]

    @property
    def note(self) -> str | None:
        if not self.rounded:
            return None
        said = " and ".join(
            f"{number} tensors of {dtype} are {'dequantized' if dtype == 'F8_E4M3' else 'rounded'}"
            for dtype, number in self.rounded.items()
        )
        return f"the source is not in BF16: {said} to it, as transformers does, and vLLM where it computes in BF16"


def bf16_source(checkpoint: Checkpoint, dequantize: bool = False) -> tuple[Checkpoint, Reading]:
    """The checkpoint as BF16, itself where it is; InputError for block-FP8 unless dequantize, and for scales that do not fit."""
    made, tensors = checkpoint, dict(checkpoint.tensors)
    block = _block(checkpoint)
    if block is not None:
        if not dequantize:
            raise InputError(
                f"{checkpoint.path}: is in FP8 with a scale for each block of {block[0]}×{block[1]} weights; --dequantize "
                "(dequantize: true in the recipe) makes BF16 of it, or quantize from the BF16 release"
            )
        config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        tensors = _dequantized(checkpoint, block)
        made = replace(made, config=config)
    model = family(checkpoint.model_type)
    if any(_is_wide_linear(info, model) for info in tensors.values()):
        tensors = {name: _rounded(info) for name, info in tensors.items()}
        made = replace(made, config=_in_bf16(made.config))
    counts: dict[str, int] = {}
    for info in tensors.values():
        if info.stored is not None:
            counts[info.stored.dtype] = counts.get(info.stored.dtype, 0) + 1
    return (replace(made, tensors=tensors) if counts else checkpoint), Reading(counts)


def _block(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the checkpoint is not block-FP8."""
    said = checkpoint.config.get("quantization_config")
    if not isinstance(said, Mapping) or said.get("quant_method") != "fp8" or not isinstance(said.get("weight_block_size"), list):
        return None
    size = said["weight_block_size"]
    if len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise InputError(f"{checkpoint.path / 'config.json'}: weight_block_size is {str(size)[:40]}, must be two sizes")
    return size[0], size[1]


def _dequantized(checkpoint: Checkpoint, block: tuple[int, int]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith(SCALE_INV):
            if name.removesuffix(SCALE_INV) + WEIGHT not in checkpoint.tensors:
                raise InputError(f"{info.file}: {name} has no weight beside it; fetch the checkpoint again")
            continue
        scales = checkpoint.tensors.get(name.removesuffix(WEIGHT) + SCALE_INV) if name.endswith(WEIGHT) else None
        if info.dtype != "F8_E4M3":
            if scales is not None:
                raise InputError(f"{info.file}: {name} is {info.dtype} and has a weight_scale_inv; fetch the checkpoint again")
            tensors[name] = info
            continue
        wanted = tuple(-(-size // step) for size, step in zip(info.shape, block, strict=True)) if len(info.shape) == 2 else ()
        if scales is None or scales.shape != wanted or scales.dtype not in ("F32", "BF16", "F16"):
            held = f"{scales.dtype} {list(scales.shape)}" if scales is not None else "missing"
            raise InputError(f"{info.file}: the weight_scale_inv of {name} {list(info.shape)} is {held}, not {list(wanted)} in F32 or BF16")
        tensors[name] = replace(_as_bf16(info), scales=scales, block=block)
    return tensors


def _is_wide_linear(info: TensorInfo, model: Any) -> bool:
    return info.dtype in WIDER and len(info.shape) == 2 and model.layer_index(info.name) is not None


def _as_bf16(info: TensorInfo) -> TensorInfo:
    return replace(info, dtype="BF16", num_bytes=2 * info.num_params, stored=info)


def _rounded(info: TensorInfo) -> TensorInfo:
    if info.dtype not in WIDER:
        return info
    if info.name.endswith(IN_FLOAT32):
        values = read_tensor(info).float()
        return _as_bf16(info) if bool((values.bfloat16().float() == values).all()) else info
    return _as_bf16(info)


def _in_bf16(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with every float16 or float32 that it names as the dtype of weights made bfloat16."""
    said = {key: _in_bf16(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    return said | {key: "bfloat16" for key in DTYPE_KEYS if said.get(key) in ("float16", "float32")}
