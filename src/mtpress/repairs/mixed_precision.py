"""The declaration of modelopt's mixed precision, written anew from what is stored.

In: the checkpoint as it stands. Out: both config files, with an entry for each quantized module. Leaves out: declarations of one
format throughout (declaration.py).
"""

import copy
from collections.abc import Mapping

from mtpress.repairs.repair import Context, Fix
from mtpress.rules.declaration import Declaration
from mtpress.rules.rule import count
from mtpress.rules.stored import INPUT_SCALE, SCALE
from mtpress.rules.subject import HF_QUANT_CONFIG, Subject


def stored_formats(subject: Subject) -> dict[str, str] | None:
    """Module → format of a recipe, where modelopt's mixed precision or FP8 is what declares them; None where another declaration does.

    Of NVFP4, what is declared says whether activations are quantized; of a module that no entry names, its input_scale does.
    """
    formats: dict[str, str] = {}
    for module in sorted(subject.quantized, key=subject.model.natural):
        tensors, scheme = subject.modules[module], subject.schemes.get(module)
        scale = tensors.get(SCALE)
        if subject.form(module) == "nvfp4":
            activations = scheme.activations if scheme is not None and scheme.kind == "nvfp4" else INPUT_SCALE in tensors
            formats[module] = "nvfp4" if activations else "nvfp4_w4a16"
        elif subject.form(module) == "fp8" and scale is not None and (scale.dtype, scale.num_bytes) == ("F32", 4):
            formats[module] = "fp8"
        else:
            return None
    mixed = subject.declared is not None and subject.declared.format == "modelopt-mixed" and len(set(formats.values())) > 1
    return formats if mixed or "fp8" in formats.values() else None


def declare_mixed(ctx: Context, kept: list[str], formats: Mapping[str, str], fp8_kv: bool) -> Fix:
    """Writes config.json and hf_quant_config.json. kept: the modules in 16 bits; fp8_kv: the KV cache is declared FP8."""
    from mtpress.formats import mixed_precision, nvfp4

    content = mixed_precision.quantization_config(nvfp4.quantization_config(kept, fp8_kv), formats)
    config = copy.deepcopy(ctx.overlay.config) | {"quantization_config": content}
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    ctx.overlay.set_config(config)
    ctx.overlay.write_json(HF_QUANT_CONFIG, mixed_precision.hf_quant_config(nvfp4.hf_quant_config(kept, fp8_kv), formats))
    said = Declaration("config.json", content).title
    return Fix(f"config.json and {HF_QUANT_CONFIG} written anew from what is stored: {said}, {count(len(kept), 'module')} named as BF16")
