"""The declaration of modelopt's mixed precision, written anew from what is stored.

In: the checkpoint as it stands. Out: both config files, with an entry for each quantized module. Leaves out: declarations of one
format throughout (declaration.py).
"""

import copy
from collections.abc import Mapping

from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.stored import INPUT_SCALE, SCALE, WEIGHT, Form
from mtpress.quant_config.view import HF_QUANT_CONFIG, Subject
from mtpress.repairs.repair import Context, Fix
from mtpress.terminal import count

HELD: dict[str, set[Form]] = {"compressed-tensors": {"nvfp4-pack-quantized", "pack-quantized", "fp8"}, "fp8": {"fp8"}}
FP8_FORMATS: dict[str, str] = {"tensor": "fp8", "channel": "fp8_by_row", "block": "fp8_in_blocks"}


def stored_formats(subject: Subject) -> dict[str, str] | None:
    """Module → format of a recipe, where modelopt's mixed precision or FP8 is what declares them; None where another declaration does.

    Of NVFP4, what is declared says whether activations are quantized; of a module that no entry names, its input_scale does.
    """
    said = subject.declared.format if subject.declared is not None else ""
    forms = {subject.form(module) for module in subject.quantized}
    if said in ("compressed-tensors", "fp8") and forms <= HELD[said]:
        return None
    formats: dict[str, str] = {}
    for module in sorted(subject.quantized, key=subject.model.natural):
        tensors, scheme = subject.modules[module], subject.schemes.get(module)
        fp8 = fp8_format(subject, module)
        if subject.form(module) == "nvfp4":
            activations = scheme.activations if scheme is not None and scheme.kind == "nvfp4" else INPUT_SCALE in tensors
            formats[module] = "nvfp4" if activations else "nvfp4_w4a16"
        elif fp8 is not None:
            formats[module] = fp8
        else:
            return None
    mixed = subject.declared is not None and subject.declared.format == "modelopt-mixed" and len(set(formats.values())) > 1
    return formats if mixed or not {"nvfp4", "nvfp4_w4a16"} >= set(formats.values()) else None


def fp8_format(subject: Subject, module: str) -> str | None:
    """Which of modelopt's kinds of FP8 a module is stored in; None where its scale is in no layout of modelopt's."""
    scheme, tensors = subject.fp8_schemes.get(module), subject.modules.get(module, {})
    scale = tensors.get(SCALE)
    if scheme is None or scale is None or scale.dtype != "F32":
        return None
    n, k = tensors[WEIGHT].shape
    shapes = {"tensor": scale.shape, "channel": (n,), "block": (-(-n // 128), 1, -(-k // 128), 1)}
    return FP8_FORMATS[scheme.scale_of] if scale.shape == shapes[scheme.scale_of] else None


def declare_mixed(ctx: Context, kept: list[str], formats: Mapping[str, str], kv: str, hf_kv: str) -> Fix:
    """Writes config.json and hf_quant_config.json. kept: the modules in 16 bits; kv, hf_kv: what each declares of the KV cache."""
    from mtpress.formats import mixed_precision, nvfp4

    content = mixed_precision.quantization_config(nvfp4.quantization_config(kept, kv == "fp8"), formats)
    config = copy.deepcopy(ctx.overlay.config) | {"quantization_config": content}
    if isinstance(config.get("text_config"), dict):
        config["text_config"].pop("quantization_config", None)
    ctx.overlay.set_config(config)
    ctx.overlay.write_json(HF_QUANT_CONFIG, mixed_precision.hf_quant_config(nvfp4.hf_quant_config(kept, hf_kv == "fp8"), formats))
    said = Declaration("config.json", content).title
    return Fix(f"config.json and {HF_QUANT_CONFIG} written anew from what is stored: {said}, {count(len(kept), 'module')} named as BF16")
