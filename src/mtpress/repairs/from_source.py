"""What repairs take from the base: tensors by name and shape, files, the config.

In: a `Context`. Out: the base's tensor or file for something that is missing or wrong here. Leaves out: when to take it.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.comparison.weights import counterpart
from mtpress.models import family
from mtpress.quant_config.stored import CODES, PLAIN_DTYPES, TITLES, form_of
from mtpress.repairs.repair import OTHER_BASE, Context, Left
from mtpress.rules.rule import QUANTIZE_AGAIN

LARGEST_SHARE = 0.25  # of the quantized matrices are put in BF16; where more are wrong, the base or the config is
TEXT_MODEL_TYPE = "qwen3_5_text"
DECLARATIONS = ("quantization_config", "compression_config")
PROBLEM_KEY = re.compile(r"config\.json: (\w+)")


def open_base(path: str | Path) -> Checkpoint:
    """The base, which must be of the family: InputError otherwise."""
    base = Checkpoint.open(path)
    family(base.model_type)
    return base


def undeclared(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a base's config.json without what it says of its own quantization."""
    new = {key: copy.deepcopy(value) for key, value in config.items() if key not in DECLARATIONS}
    if isinstance(inner := new.get("text_config"), dict):
        new["text_config"] = {key: value for key, value in inner.items() if key not in DECLARATIONS}
    return new


def base_tensor(ctx: Context, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo | None:
    """The base's tensor of that name, under whatever prefix; None where it has none of that shape in 16 or 32 bits."""
    found = counterpart(name, ctx.theirs)
    return found if found is not None and (shape is None or found.shape == shape) and found.dtype in PLAIN_DTYPES else None


def quantized_there(ctx: Context, name: str) -> Left | None:
    """That the base holds the module of a tensor quantized, so that it has no bits to put in its place; None where it does not."""
    module = name.rpartition(".")[0]
    for suffix in CODES:
        info = counterpart(f"{module}.{suffix}", ctx.theirs)
        if info is not None and info.dtype not in PLAIN_DTYPES:
            why = f"the base holds {name} as {TITLES[form_of({suffix: info})]}, and only numbers in 16 bits are put from it"
            return Left(why, f"a --base that has it in 16 bits; or {QUANTIZE_AGAIN}")
    return None


def not_there(ctx: Context, name: str, why: str) -> Left:
    """Why a tensor cannot come from the base: it is quantized there or, as `why` says, not there."""
    return quantized_there(ctx, name) or Left(why, OTHER_BASE)


def filled_config(ctx: Context) -> tuple[dict[str, Any], list[str]]:
    """config.json with the keys that it lacks, or that no model can have, from the base's; what it says otherwise stays. And these keys."""
    assert ctx.base is not None
    config, taken = copy.deepcopy(ctx.overlay.config), list[str]()
    ours = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    theirs = ctx.base.text_config
    while (problem := ctx.overlay.subject_with(config).config_problem) is not None and (said := PROBLEM_KEY.search(problem)):
        level, source, key = (ours, theirs, said[1]) if said[1] in theirs else (config, ctx.base.config, said[1])
        if key in taken or key not in source:
            break
        level[key] = copy.deepcopy(source[key])
        taken.append(key)
    return config, taken


def vision_config(ctx: Context) -> dict[str, Any]:
    """config.json of the model with its tower, from one that was rewritten to text only: its own keys within the base's frame."""
    assert ctx.base is not None
    config, mine = undeclared(ctx.base.config), ctx.overlay.config
    if isinstance(mine.get("text_config"), dict):
        return copy.deepcopy(mine) | {key: value for key, value in config.items() if key not in mine} | {"model_type": config["model_type"]}
    text = {key: copy.deepcopy(value) for key, value in mine.items() if key not in ("architectures", "quantization_config")}
    config["text_config"] = {**config.get("text_config", {}), **text, "model_type": TEXT_MODEL_TYPE}
    return config | ({"quantization_config": mine["quantization_config"]} if "quantization_config" in mine else {})
