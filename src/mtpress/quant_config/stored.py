"""In what form a module is stored, by the names and dtypes of its tensors.

In: the tensors of one module, by the last part of their names. Out: a `Form`. Leaves out: what the config says of it.
Formats: modelopt (weight, weight_scale, weight_scale_2, input_scale), compressed-tensors (weight_packed, …), GPTQ and
AutoRound (qweight, qzeros, scales), FP8 (weight in float8, weight_scale or weight_scale_inv).
"""

from collections.abc import Mapping
from typing import Literal

from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.quant_config.matching.matcher import FP8_BLOCK, Scheme
from mtpress.quant_config.matching.matcher import SCALE as SCALE
from mtpress.quant_config.matching.matcher import SCALE_INV as SCALE_INV

Form = Literal["plain", "nvfp4", "fp8", "nvfp4-pack-quantized", "pack-quantized", "gptq", "none", "unknown"]
TITLES: dict[Form, str] = {
    "plain": "BF16", "nvfp4": "NVFP4", "fp8": "FP8", "nvfp4-pack-quantized": "compressed-tensors NVFP4",
    "pack-quantized": "compressed-tensors INT4", "gptq": "GPTQ/AutoRound INT4", "none": "nothing", "unknown": "an unknown format",
}  # fmt: skip
PLAIN_DTYPES = ("BF16", "F16", "F32", "F64")

WEIGHT, SCALE_2, INPUT_SCALE = "weight", "weight_scale_2", "input_scale"
GLOBAL_SCALE, INPUT_GLOBAL_SCALE = "weight_global_scale", "input_global_scale"  # compressed-tensors': reciprocals
ZERO_POINT, WEIGHT_SHAPE = "weight_zero_point", "weight_shape"
NVFP4_GROUP_SIZE = 16
QWEIGHT, QZEROS, SCALES = "qweight", "qzeros", "scales"
WEIGHT_PACKED = "weight_packed"
NVFP4_SCALES = (SCALE, SCALE_2, INPUT_SCALE)
KV_SCALES = ("k_scale", "v_scale")
# What each form may have beside a bias; a tensor outside these is not of the format.
SUFFIXES: dict[Form, tuple[str, ...]] = {
    "plain": (WEIGHT,),
    "nvfp4": (WEIGHT, *NVFP4_SCALES),
    "fp8": (WEIGHT, SCALE, SCALE_INV, INPUT_SCALE),
    "nvfp4-pack-quantized": (WEIGHT_PACKED, SCALE, GLOBAL_SCALE, INPUT_GLOBAL_SCALE),
    "pack-quantized": (WEIGHT_PACKED, SCALE, WEIGHT_SHAPE, ZERO_POINT, "weight_g_idx"),
    "gptq": (QWEIGHT, QZEROS, SCALES, "g_idx"),
}
CODES = (WEIGHT, WEIGHT_PACKED, QWEIGHT)
SCALE_SUFFIXES = frozenset(suffix for names in SUFFIXES.values() for suffix in names) - {*CODES}
# The float32 scalars of NVFP4: of the weights, then of the activations.
SCALARS: dict[Form, tuple[str, str]] = {"nvfp4": (SCALE_2, INPUT_SCALE), "nvfp4-pack-quantized": (GLOBAL_SCALE, INPUT_GLOBAL_SCALE)}
FP8_BLOCKS = tuple((size, size) for size in (128, 64, 32, 16))
FP8_SCALARS = (SCALE, INPUT_SCALE)  # the same of FP8 with a scale a tensor
SCALAR_SCALES = (SCALE, SCALE_2, GLOBAL_SCALE)  # those that a matrix is multiplied with, where they are scalars


def form_of(tensors: Mapping[str, TensorInfo]) -> Form:
    """The form of a module; "none" where only scales are left of it."""
    if QWEIGHT in tensors:
        return "gptq"
    if WEIGHT_PACKED in tensors:
        return "nvfp4-pack-quantized" if tensors[WEIGHT_PACKED].dtype == "U8" else "pack-quantized"
    if WEIGHT not in tensors:
        return "none"
    dtype = tensors[WEIGHT].dtype
    if dtype in PLAIN_DTYPES:
        return "plain"
    if dtype == "U8":
        return "nvfp4"
    return "fp8" if dtype.startswith("F8_") else "unknown"


def fp8_scheme(tensors: Mapping[str, TensorInfo], block: tuple[int, int] = FP8_BLOCK) -> Scheme | None:
    """How an FP8 module is stored, by its shapes; None where its codes or its scale are missing, or fit no such scheme.

    block: what is tried first, then the usual squares. modelopt stores one scale a row as [N] and blocks as [N/128, 1, K/128, 1],
    others as [N, 1] and [N/128, K/128].
    """
    codes, scale = tensors.get(WEIGHT), tensors.get(SCALE_INV) or tensors.get(SCALE)
    if codes is None or scale is None or len(codes.shape) != 2:
        return None
    (n, k), static = codes.shape, INPUT_SCALE in tensors
    name = scale.name.rpartition(".")[2]
    if scale.shape in ((), (1,)):
        return Scheme("fp8", 8, -1, True, True, "tensor", static, scale_name=name)
    if scale.shape in ((n,), (n, 1)):
        return Scheme("fp8", 8, -1, True, True, "channel", static, scale_name=name)
    for height, width in (block, *FP8_BLOCKS):
        rows, columns = -(-n // height), -(-k // width)
        if scale.shape in ((rows, columns), (rows, 1, columns, 1)):
            return Scheme("fp8", 8, -1, True, True, "block", static, (height, width), name)
    return None
