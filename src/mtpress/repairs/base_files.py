"""What repairs take from the base: tensors by name and shape, files, the config.

In: a `Context`. Out: the base's tensor or file for something that is missing or wrong here. Leaves out: when to take it.
"""

import copy
from pathlib import Path
from typing import Any

from mtpress.checkpoint import Checkpoint, TensorInfo
from mtpress.comparison import counterpart, counterparts
from mtpress.errors import InputError
from mtpress.models import family
from mtpress.models.qwen3_5_engine import ARCHITECTURE
from mtpress.repairs.repair import Context
from mtpress.rules.subject import Subject

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
    """The base's tensor of that name, under whatever prefix; None where it has none of that shape."""
    if ctx.base is None:
        return None
    found = counterpart(name, counterparts(ctx.base))
    return found if found is not None and (shape is None or found.shape == shape) else None


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
