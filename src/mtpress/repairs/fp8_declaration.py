"""The declaration of quant_method fp8, written anew from what is stored.

In: a checkpoint whose quantized modules are all FP8. Out: its quantization_config, where this method can hold them. Leaves out: FP8 in
modelopt's layout (mixed_precision.py) and in compressed-tensors' (compressed_groups.py).
"""

from collections.abc import Iterator
from typing import Any

from mtpress.quant_config.matching.fp8 import LISTS
from mtpress.quant_config.stored import INPUT_SCALE, SCALE_INV
from mtpress.quant_config.view import Subject
from mtpress.repairs.bf16 import in_bf16
from mtpress.repairs.repair import Context, Fix, Left


def fp8_content(subject: Subject, kept: list[str]) -> dict[str, Any] | None:
    """quantization_config of quant_method fp8; None where another declaration must hold what is stored: a scale a row, several kinds,
    or a scale a tensor that another method declares."""
    declared = subject.declared
    schemes = {subject.fp8_schemes.get(module) for module in subject.quantized}
    kinds = {(scheme.scale_of, scheme.scale_name, scheme.block) for scheme in schemes if scheme is not None}
    if None in schemes or len(kinds) != 1 or any(subject.form(module) != "fp8" for module in subject.quantized):
        return None
    scale_of, name, block = kinds.pop()
    own = declared is not None and declared.format == "fp8"
    if scale_of == "channel" or (scale_of == "block") != (name == SCALE_INV) or (declared is not None and not own and scale_of == "tensor"):
        return None
    old = dict(declared.content) if declared is not None and own else {"quant_method": "fp8", "fmt": "e4m3"}
    static = scale_of == "tensor" and all(INPUT_SCALE in subject.modules[module] for module in subject.quantized)
    content = {key: value for key, value in old.items() if key != "weight_block_size"}
    content["activation_scheme"] = "static" if static else "dynamic"
    if scale_of == "block":
        content["weight_block_size"] = list(block)
    return content | {key: list(kept) for key in [key for key in LISTS if key in content] or [LISTS[1]]}


def unloadable_lm_head(ctx: Context) -> Iterator[Fix | Left]:
    """Dequantizes an lm_head in FP8 beside blocks: quant_method fp8 has no method for it, and no other has these blocks."""
    scheme = ctx.subject.fp8_schemes.get("lm_head")
    if scheme is not None and scheme.scale_name == SCALE_INV:
        yield from in_bf16(ctx, ("lm_head",), damaged=False).told(ctx)
