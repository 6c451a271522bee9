"""Repairs of config.json: the class, the types, the dtype, sizes from the base."""

import copy
from collections.abc import Iterator
from typing import Any

from mtpress.models.qwen3_5.engine import ARCHITECTURE
from mtpress.repairs.from_source import filled_config
from mtpress.repairs.repair import OTHER_BASE, Context, Fix, Left, Repair, Turn, needs_base
from mtpress.rules.config import TEXT_MODEL_TYPE
from mtpress.rules.rule import Finding


def config_from_base(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.base is None:
        yield needs_base("what config.json lacks")
        return
    config, taken = filled_config(ctx)
    if not taken:
        yield Left(finding.message, OTHER_BASE)
        return
    ctx.overlay.set_config(config)
    yield Fix(f"{', '.join(taken)} of config.json taken from the base, what else it says stays")


def architecture(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    right = ARCHITECTURE[ctx.subject.checkpoint.model_type]
    ctx.overlay.set_config(ctx.overlay.config | {"architectures": [right]})
    yield Fix(f"architectures set to {right}, the class of the model_type")


def text_model_type(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    config = copy.deepcopy(ctx.overlay.config)
    config["text_config"]["model_type"] = TEXT_MODEL_TYPE
    ctx.overlay.set_config(config)
    yield Fix(f"text_config.model_type set to {TEXT_MODEL_TYPE}")


def _levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    inner = config.get("text_config")
    return [config, inner] if isinstance(inner, dict) else [config]


def dtype(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    config = copy.deepcopy(ctx.overlay.config)
    levels = _levels(config)
    for level in levels:
        if "dtype" in level or level.pop("torch_dtype", None) is not None or level is levels[-1]:
            level.pop("torch_dtype", None)
            level["dtype"] = "bfloat16"
    ctx.overlay.set_config(config)
    yield Fix("dtype set to bfloat16")


def torch_dtype(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    config = copy.deepcopy(ctx.overlay.config)
    for level in _levels(config):
        if "torch_dtype" in level:
            old = level.pop("torch_dtype")
            level.setdefault("dtype", old)
    ctx.overlay.set_config(config)
    yield Fix("torch_dtype renamed to dtype")


REPAIRS = (
    Repair("config-incomplete", "the keys that are missing are the base's (`--base`), the others stay", config_from_base, Turn.CONFIG),
    Repair("architecture", "`architectures` names the class of the model_type", architecture, Turn.CONFIG),
    Repair("text-model-type", f"set to {TEXT_MODEL_TYPE}", text_model_type, Turn.CONFIG),
    Repair("dtype", "set to bfloat16", dtype, Turn.CONFIG),
    Repair("rope-yarn", "nothing is wrong"),
    Repair("torch-dtype", "renamed to dtype", torch_dtype, Turn.CONFIG),
)
