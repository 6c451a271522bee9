"""What repairs take from the base: tensors by name and shape, files, the config.

In: a `Context`. Out: the base's tensor or file for something that is missing or wrong here. Leaves out: when to take it.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtpress.checkpoint import Checkpoint, TensorInfo
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.models.qwen3_5_engine import ARCHITECTURE
from mtpress.repairs.overlay import Overlay
from mtpress.repairs.repair import Context
from mtpress.rules.stored import SCALE_SUFFIXES, WEIGHT
from mtpress.rules.subject import Subject

BODY_PREFIXES = ("model.language_model.", "model.")
LARGEST_SHARE = 0.25  # of the quantized matrices are put in BF16; where more are wrong, the base or the config is
TEXT_MODEL_TYPE = "qwen3_5_text"


def open_base(path: str | Path, checkpoint_name: str) -> Checkpoint:
    """The base, which must be a BF16 checkpoint of the family; InputError otherwise."""
    base = Checkpoint.open(path)
    family(base.model_type)
    if Subject(base).quantized:
        raise InputError(f"{base.path}: is quantized itself; --base is the BF16 checkpoint that {checkpoint_name} was made from")
    return base


def base_tensor(ctx: Context, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo | None:
    """The base's tensor of that name, the body's under either of its prefixes; None where it has none of that shape."""
    if ctx.base is None:
        return None
    names = [name]
    for ours in BODY_PREFIXES:
        if name.startswith(ours):
            names += [theirs + name.removeprefix(ours) for theirs in BODY_PREFIXES]
            break
    found = next((ctx.base.tensors[n] for n in names if n in ctx.base.tensors), None)
    return found if found is not None and (shape is None or found.shape == shape) else None


def group_of(subject: Subject, module: str) -> tuple[str, ...]:
    """The modules that the engine fuses with one, itself among them; those that are stored in no form too."""
    return next((linear.modules for linear in subject.linears if module in linear.modules), (module,))


def bring_back(ctx: Context, modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Puts the base's BF16 matrices in place of modules, whatever is stored of them: (brought back, not to be had).

    The engine fuses linears, and all shards of one must be in one format: where a module is among them and the others are quantized,
    they are brought back with it, or none is.
    """
    subject, done, missing = ctx.subject, list[str](), list[str]()
    for module in dict.fromkeys(modules):
        if module in done:
            continue
        group = group_of(subject, module)
        wanted = [m for m in group if m == module or subject.form(m) != "plain"]
        origins = {m: base_tensor(ctx, f"{m}.{WEIGHT}", subject.called_for.get(f"{m}.{WEIGHT}")) for m in wanted}
        if any(origin is None or origin.dtype != "BF16" for origin in origins.values()):
            missing.append(module)
            continue
        for member, origin in origins.items():
            drop_scales(ctx.overlay, subject, member)
            assert origin is not None
            ctx.overlay.put(f"{member}.{WEIGHT}", origin)
            done.append(member)
    return done, missing


def drop_scales(overlay: Overlay, subject: Subject, module: str) -> None:
    """Takes away every tensor of a quantized form that a module has; a bias and the scales of the KV cache stay."""
    for suffix in subject.modules.get(module, {}):
        if suffix in SCALE_SUFFIXES or suffix in ("weight_packed", "qweight"):
            overlay.drop(f"{module}.{suffix}")


def base_config(ctx: Context) -> dict[str, Any]:
    """config.json of the base, with this checkpoint's own quantization_config; in text-only form where only that fits what is stored."""
    assert ctx.base is not None
    overlay, subject = ctx.overlay, ctx.subject
    config = copy.deepcopy(ctx.base.config)
    if "quantization_config" in overlay.config:
        config["quantization_config"] = overlay.config["quantization_config"]
    bare = all(not name.startswith("model.language_model.") for name in subject.tensors)
    if (
        overlay.config.get("model_type") == TEXT_MODEL_TYPE
        and bare
        and not subject.stored_vision
        and isinstance(config.get("text_config"), dict)
    ):
        text: dict[str, Any] = config["text_config"] | {"model_type": TEXT_MODEL_TYPE, "architectures": [ARCHITECTURE[TEXT_MODEL_TYPE]]}
        return text | ({"quantization_config": config["quantization_config"]} if "quantization_config" in config else {})
    if overlay.config.get("language_model_only") is True and not subject.stored_vision:
        config["language_model_only"] = True
    return config
