"""Writes into a quantization config which modules stay in BF16, so that vLLM 0.32 takes exactly these so.

In: a declaration as it stands, the modules in BF16 and the quantized ones by their full names in the checkpoint. Out: its content
with the entries that decide written anew, and every other key as it was; or the config files with it. Leaves out: finding out
which modules are which (models/, quant_config/view.py), and how the entries are matched (matching/).

Full names everywhere: a glob that holds in one engine holds too little or too much in the next. All shards of a fused linear are
named, for an engine refuses a linear of which a part is spared. What decides, by format:

    modelopt              ignore (config.json) or quantization.exclude_modules (hf_quant_config.json); of mixed precision also
                          quantized_layers and the targets of the groups, which name what is quantized
    compressed-tensors    ignore
    FP8                   modules_to_not_convert; ignored_layers comes first where it has an entry, so it is written where it is there
    AutoRound             extra_config (16 bits), block_name_to_quantize
    GPTQ                  modules_in_block_to_quantize, where it is there; without it vLLM goes by what is stored. Its `dynamic`
                          keys come first, so none that spares a quantized linear may stay. lm_head
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.json_files import read_json_object
from mtpress.errors import InputError
from mtpress.json_files import json_bytes
from mtpress.models import family
from mtpress.models.qwen3_5.engine import RENAMES
from mtpress.models.qwen3_5.names import FUSED_OF, layer_index
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.matching.expressions import matches
from mtpress.quant_config.matching.fp8 import LISTS
from mtpress.quant_config.view import CONFIG, HF_QUANT_CONFIG, Subject

AUTO_ROUND_CONFIG = "quantization_config.json"
WHOLE_BITS = 16
WHOLE = {"bits": WHOLE_BITS, "data_type": "fp"}
ENGINE_LM_HEAD = "language_model.lm_head"  # compressed-tensors does not rename `lm_head`, which has no dot


def spare(declared: Declaration, kept: Sequence[str], quantized: Sequence[str], num_layers: int, prefix: str) -> dict[str, Any]:
    """The content of a declaration that leaves exactly `kept` in BF16. num_layers, prefix: of the body.

    InputError for a format whose entries are not known here.
    """
    content = copy.deepcopy(dict(declared.content))
    if declared.method.startswith("modelopt"):
        inner = content["quantization"] if declared.legacy else content
        inner[declared.ignore_key] = list(kept)
        _spare_layers(content, inner, kept)
    elif declared.format == "compressed-tensors":
        content["ignore"] = [*kept, *([ENGINE_LM_HEAD] if "lm_head" in kept and _targets_lm_head(content) else [])]
    elif declared.format == "fp8":
        for key in [key for key in LISTS if key in content] or [LISTS[1]]:
            content[key] = list(kept)
    elif declared.format == "auto-round":
        _spare_auto_round(content, kept, quantized, num_layers, prefix)
    elif declared.format == "gptq":
        _spare_gptq(content, kept, quantized)
    else:
        raise InputError(
            f"{declared.file}: declares {declared.title}; mtpress can say what stays in BF16 to modelopt, compressed-tensors, FP8, "
            "AutoRound and GPTQ alone"
        )
    return content


def config_contents(
    source: Checkpoint | Subject,
    kept: Sequence[str],
    quantized: Sequence[str],
    config: Mapping[str, Any] | None = None,
    *,
    leave: Callable[[Declaration], bool] = lambda declared: False,
) -> dict[str, bytes]:
    """File name → content of every config file of a checkpoint, each of whose declarations spares `kept`.

    config: what config.json holds from now on, but for the declaration; as it is, if None. leave: whether a declaration stays as it
    is. Files that declare nothing that an engine reads stay out, config.json with them where `config` is None. InputError where
    spare() raises it, and for a file that is no JSON.
    """
    source = source.checkpoint if isinstance(source, Subject) else source
    model = family(source.model_type)
    prefix = model.body_prefix({**source.tensors, **dict.fromkeys(f"{module}.weight" for module in quantized)})
    num_layers = len(model.layer_types(source.config))

    def spared(file: str, content: Mapping[str, Any]) -> dict[str, Any]:
        declared = Declaration(file, content)
        return dict(content) if leave(declared) else spare(declared, kept, quantized, num_layers, prefix)

    new = copy.deepcopy(dict(source.config if config is None else config))
    found = config is not None
    for level in (new, new.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(level, dict) and isinstance(said := level.get(key), dict) and said:
                level[key] = spared(CONFIG, said)
                found = True
    contents = {CONFIG: new} if found else {}
    for name in (HF_QUANT_CONFIG, AUTO_ROUND_CONFIG):
        if (source.path / name).is_file():
            content = read_json_object(source.path / name)
            if Declaration(name, content).method:
                contents[name] = spared(name, content)
    return {name: json_bytes(content) for name, content in contents.items()}


def _spare_layers(content: dict[str, Any], inner: dict[str, Any], kept: Sequence[str]) -> None:
    """Takes kept modules out of the lists of modelopt's mixed precision; what is quantized and not in them, they have no format for."""
    spared = set(kept)
    if isinstance(layers := inner.get("quantized_layers"), Mapping):
        inner["quantized_layers"] = {name: entry for name, entry in layers.items() if name not in spared}
        groups = content.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            if isinstance(group, dict) and isinstance(targets := group.get("targets"), list):
                group["targets"] = [target for target in targets if target not in spared]


def _targets_lm_head(content: Mapping[str, Any]) -> bool:
    groups = content.get("config_groups")
    targets = [
        target
        for group in (groups.values() if isinstance(groups, Mapping) else ())
        if isinstance(group, Mapping) and isinstance(group.get("targets"), list)
        for target in group["targets"]
    ]
    return any(isinstance(target, str) and target.startswith("re:") and matches(target[3:], ENGINE_LM_HEAD) for target in targets)


def _spare_auto_round(content: dict[str, Any], kept: Sequence[str], quantized: Sequence[str], num_layers: int, prefix: str) -> None:
    key = next((key for key in ("block_name_to_quantize", "to_quant_block_names") if key in content), "block_name_to_quantize")
    said = content.get(key)
    names = said.split(",") if isinstance(said, str) else said if isinstance(said, list) else []
    blocks = [name for name in names if isinstance(name, str)]
    outside = [module for module in quantized if module == "lm_head"]
    inside = [module for module in quantized if module != "lm_head"]
    whole = bool(blocks) and all(module.startswith(tuple(blocks)) for module in inside)
    if not whole or not all(any(module.startswith(block) for module in inside) for block in blocks):
        blocks = _blocks(inside, num_layers, prefix)
        content[key] = blocks if isinstance(said, list) else ",".join(blocks)
    old = content.get("extra_config")
    extra: dict[str, Any] = {}
    for name, entry in old.items() if isinstance(old, Mapping) else ():
        bits = entry.get("bits", content.get("bits")) if isinstance(entry, Mapping) else None
        if isinstance(bits, int) and bits < WHOLE_BITS:
            extra[name] = entry
    for module in outside:  # vLLM and transformers leave lm_head in BF16 unless it is named
        extra.setdefault(module, {name: content[name] for name in ("bits", "group_size", "sym", "data_type") if name in content})
    content["extra_config"] = extra | {module: dict(WHOLE) for module in kept}


def _blocks(quantized: Sequence[str], num_layers: int, prefix: str) -> list[str]:
    """The beginnings of names under which the quantized modules stand: all layers of the body, or just these; and what else there is."""
    layers = sorted({index for module in quantized if (index := layer_index(f"{module}.weight")) is not None})
    whole = layers == list(range(num_layers))
    others = (module for module in quantized if layer_index(f"{module}.weight") is None)
    parts = dict.fromkeys(module.partition("layers.")[0] + "layers" if "layers." in module else module for module in others)
    return [*([f"{prefix}layers"] if whole else [f"{prefix}layers.{index}." for index in layers]), *parts]


def _spare_gptq(content: dict[str, Any], kept: Sequence[str], quantized: Sequence[str]) -> None:
    said = content.get("modules_in_block_to_quantize")
    if said:
        nested = isinstance(said, list) and all(isinstance(name, list) for name in said)
        names = [name for inner in said for name in inner] if nested else said
        well = isinstance(names, list) and all(isinstance(name, str) for name in names)
        hit = {module for module in (*kept, *quantized) if well and any(name in module for name in names)}
        if hit != set(quantized):
            content["modules_in_block_to_quantize"] = [list(quantized)] if nested else list(quantized)
    if isinstance(dynamic := content.get("dynamic"), Mapping):
        # vLLM's draft takes any spared name with "mtp" in it for its whole layer.
        nameable = [m for m in kept if "mtp" not in m] if any(m.startswith("mtp.layers.") for m in quantized) else kept
        new: dict[str, Any] = {}
        for key, value in dynamic.items():
            if key.startswith("-:") and any(_spares(key, module) for module in quantized):
                new |= {f"-:{re.escape(module)}$": {} for module in nameable if _spares(key, module)}
            else:
                new[key] = value
        content["dynamic"] = new
    if content.get("lm_head", False) != ("lm_head" in quantized):
        content["lm_head"] = "lm_head" in quantized


def _spares(key: str, module: str) -> bool:
    """Whether a `-:` key of `dynamic` leaves a module in BF16: by its own name or that of its fused linear, as any engine calls it."""
    if "mtp" in key and module.startswith("mtp.layers."):
        return True
    start, _, linear = module.rpartition(".")
    start, _, owner = start.rpartition(".")
    names = {module}
    if fused := FUSED_OF.get(f"{owner}.{linear}"):
        names.add(f"{start}.{fused}")
    for renames in RENAMES.values():
        for old, new in renames:
            names |= {name.replace(old, new, 1) for name in names if name.startswith(old)}
    return any(matches(key[2:], name) for name in names)
