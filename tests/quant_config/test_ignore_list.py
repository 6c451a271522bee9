"""What is written into a quantization config, held against vLLM's matching (matching/, which tests/engine holds against vLLM itself)."""

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from checkpoints import small_config
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.models.qwen3_5 import engine as qwen3_5_engine
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.models.qwen3_5.engine import TEXT_ARCHITECTURE, VL_ARCHITECTURE
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.ignore_list import config_contents, spare
from mtpress.quant_config.matching import matcher_of
from mtpress.quant_config.view import Subject

MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.47.0"}}
LEGACY = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16},
}
NVFP4_WEIGHTS = {"num_bits": 4, "group_size": 16, "strategy": "tensor_group", "symmetric": True, "type": "float"}
TENSORS: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear", "re:.*lm_head$"], "weights": NVFP4_WEIGHTS, "input_activations": None}},
}  # fmt: skip
ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8_WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
PATTERNS = ["re:.*mtp.*", "model.visual*", "*in_proj_a", "lm_head", "model.language_model.layers.0*", "", "mtp.layers"]
# What a checkpoint may say before: nothing, too much, too little, other names.
BEFORE: dict[str, dict[str, Any]] = {
    "modelopt": MODELOPT,
    "modelopt, globs": {**MODELOPT, "ignore": PATTERNS},
    "modelopt, no list": {**MODELOPT, "ignore": 3},
    "modelopt, hf_quant_config": LEGACY,
    "modelopt, hf_quant_config, globs": {**LEGACY, "quantization": {**LEGACY["quantization"], "exclude_modules": PATTERNS}},  # type: ignore[dict-item]
    "compressed-tensors": TENSORS,
    "compressed-tensors, expressions": {**TENSORS, "ignore": ["re:.*mlp.*", "re:^mtp.*", "Linear"]},
    "AutoRound": ROUND,
    "AutoRound, its default": {
        **ROUND,
        "block_name_to_quantize": ["model.language_model.layers", "mtp.layers"],
        "extra_config": {"mtp.fc": {"bits": 16, "data_type": "fp"}, "mtp.layers.0.mlp.down_proj": {"bits": 8}},
    },
    "AutoRound, expressions": {
        **ROUND,
        "block_name_to_quantize": "model.language_model.layers,model.visual",
        "extra_config": {".*mlp.*": {"bits": 16}, "q_proj": {"bits": 16}, "odd": 3},
    },
    "AutoRound, older": {**ROUND, "to_quant_block_names": "model.layers"},
    "compressed-tensors, mixed": {
        **TENSORS,
        "format": "mixed-precision",
        "config_groups": {
            "group_0": {**TENSORS["config_groups"]["group_0"], "targets": ["re:.*mlp.*"], "format": "nvfp4-pack-quantized"},
            "group_1": {"targets": ["Linear", "re:.*lm_head$"], "weights": FP8_WEIGHTS, "format": "float-quantized"},
        },
    },
    "FP8": {**FP8, "modules_to_not_convert": ["lm_head", "re:.*mtp.*", "model.visual"]},
    "FP8, two lists": {**FP8, "ignored_layers": ["mtp.fc"], "modules_to_not_convert": ["model.visual"]},
    "FP8, no list": FP8,
    "GPTQ": GPTQ,
    "GPTQ, parts": {**GPTQ, "lm_head": True, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj", "mlp"]]},
    "GPTQ, dynamic": {
        **GPTQ,
        "modules_in_block_to_quantize": ["layers"],
        "dynamic": {"-:.*mtp.*": {}, "-:.*layers.*": {}, "-:.*gate_up_proj": {}, "+:.*down_proj": {"bits": 4}},
    },
}  # fmt: skip


@cache
def stored(kind: str, architecture: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """A config; module → "kept" or "quantized" for every module whose weight is a matrix or belongs to the head; the prefix."""
    config = small_config() | {"architectures": [architecture]}
    prefix = "model.language_model." if architecture == VL_ARCHITECTURE else "model."
    if architecture == TEXT_ARCHITECTURE:
        config = {**config["text_config"], "architectures": [architecture]}
    config.setdefault("text_config", config)["num_hidden_layers"] = 12
    shapes = dict(qwen3_5.body_shapes(config, prefix)) | qwen3_5.mtp_shapes(config)
    shapes |= qwen3_5.vision_shapes(config) if architecture == VL_ARCHITECTURE else {}
    linears = {linear for part in qwen3_5.QUANTIZABLE.values() for linear in part}
    found = {}
    for name in shapes:
        module, layer = qwen3_5.module_of(name), qwen3_5.layer_index(name)
        body = layer is not None and module.partition(f"layers.{layer}.")[2] in linears
        head = module.startswith("mtp.layers.0.") and "norm" not in module
        quantized = {
            "all": body,
            "no GDN": body and "linear_attn" not in module,
            "not layers 1 and 11": body and layer not in (1, 11),
            "the head's layer too": body or head,
            "lm_head too": body or module == "lm_head",
            "the first layer": body and layer == 0,
        }[kind]
        if name.endswith(".weight"):
            found[module] = "quantized" if quantized else "kept"
    return config, found, prefix


KINDS = ("all", "no GDN", "not layers 1 and 11", "the head's layer too", "lm_head too", "the first layer")


@pytest.mark.parametrize("architecture", [VL_ARCHITECTURE, TEXT_ARCHITECTURE])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", list(BEFORE))
def test_the_engine_keeps_exactly_what_is_kept(before: str, kind: str, architecture: str) -> None:
    config, modules, prefix = stored(kind, architecture)
    kept = [module for module, what in modules.items() if what == "kept"]
    quantized = [module for module, what in modules.items() if what == "quantized"]
    content = copy.deepcopy(BEFORE[before])
    declared = Declaration("config.json", content)
    new = Declaration("config.json", spare(declared, kept, quantized, 12, prefix))
    assert content == BEFORE[before]  # what was read stays as it is
    dtypes = {f"{module}.weight": "BF16" for module in kept} | {f"{module}.qweight": "I32" for module in quantized}
    matcher = matcher_of(new, architecture, dtypes)
    assert matcher is not None and not matcher.malformed
    wrong = {}
    for linear in qwen3_5_engine.linears(config, architecture, prefix):
        what = {modules[module] for module in linear.modules}
        if declared.format == "fp8" and linear.modules == ("lm_head",):
            what = {"kept"}  # which vLLM never takes as FP8
        if matcher.verdict(linear) != ("ignored" if what == {"kept"} else "quantized"):
            wrong[linear.prefix] = matcher.verdict(linear)
    if declared.format == "gptq" and before == "GPTQ, dynamic" and kind == "the head's layer too":
        assert not any(key.startswith("-:") and "mtp" in key for key in new.content["dynamic"])
    assert wrong == {}
    assert not any(set("*[]()|") & set(entry) for entry in _entries(new))


def _entries(declared: Declaration) -> list[str]:
    """Every name that a declaration spares, or quantizes."""
    content = declared.content
    extra = content.get("extra_config", {})
    blocks = content.get("block_name_to_quantize", content.get("to_quant_block_names", []))
    blocks = blocks.split(",") if isinstance(blocks, str) else blocks
    spared = [name for key in ("modules_to_not_convert", "ignored_layers") for name in content.get(key, [])]
    return [*declared.ignore, *spared, *(name for name, entry in extra.items() if entry.get("bits") == 16), *blocks]


@pytest.mark.parametrize("before", list(BEFORE))
def test_every_other_key_stays(before: str) -> None:
    _, modules, prefix = stored("all", VL_ARCHITECTURE)
    kept, quantized = ([m for m, what in modules.items() if what == w] for w in ("kept", "quantized"))
    new = spare(Declaration("config.json", BEFORE[before]), kept, quantized, 12, prefix)
    ours = {
        "ignore", "exclude_modules", "extra_config", "block_name_to_quantize", "to_quant_block_names", "modules_in_block_to_quantize",
        "dynamic", "lm_head", "modules_to_not_convert", "ignored_layers",
    }  # fmt: skip

    def rest(content: Mapping[str, Any]) -> dict[str, Any]:
        return {key: rest(value) if key == "quantization" else value for key, value in content.items() if key not in ours}

    assert rest(new) == rest(BEFORE[before])
    again = spare(Declaration("config.json", new), kept, quantized, 12, prefix)
    assert again == new  # what is right stays


def test_what_is_right_already_stays_as_it_is_said() -> None:
    """A list of parts that hits exactly the quantized modules, a positive rule, and blocks that hold nothing else."""
    _, modules, prefix = stored("all", VL_ARCHITECTURE)
    kept, quantized = ([m for m, what in modules.items() if what == w] for w in ("kept", "quantized"))
    parts = [["model.language_model.layers.3.self_attn.q_proj", "model.language_model.layers"]]
    gptq = {**GPTQ, "modules_in_block_to_quantize": parts, "dynamic": {"+:.*": {"bits": 4}, "-:.*in_proj_[ab].*": {}}}
    only = [m for m in kept if qwen3_5.layer_index(f"{m}.weight") is None]
    assert spare(Declaration("c", gptq), only, quantized, 12, prefix) == gptq
    said = spare(Declaration("c", {**ROUND, "block_name_to_quantize": "model.language_model.layers"}), kept, quantized, 12, prefix)
    assert said["block_name_to_quantize"] == "model.language_model.layers"


def test_formats_that_are_not_known_are_refused() -> None:
    with pytest.raises(InputError, match="AWQ"):
        spare(Declaration("config.json", {"quant_method": "awq"}), [], [], 12, "model.")


def test_config_files_of_a_build(small_nvfp4: dict[str, Path]) -> None:
    """Of mtpress' own build both files come out as they are; with two kept modules less and more, both say so."""
    path = small_nvfp4["nvfp4-mtp-vlm"]
    source = Checkpoint.open(path)
    subject = Subject(source)
    kept = qwen3_5.kept_modules(source.tensors, "model.language_model.")
    assert config_contents(source, kept, subject.quantized).keys() == {"config.json", "hf_quant_config.json"}
    for name, content in config_contents(subject, kept, subject.quantized).items():
        assert content == (path / name).read_bytes()
    changed = config_contents(source, ["only.this"], subject.quantized, {**source.config, "new": 1})
    config, hf = (json.loads(changed[name]) for name in ("config.json", "hf_quant_config.json"))
    assert (config["new"], config["quantization_config"]["ignore"], hf["quantization"]["exclude_modules"]) == (
        1,
        ["only.this"],
        ["only.this"],
    )
    assert {**source.config, "new": 1, "quantization_config": {**source.config["quantization_config"], "ignore": ["only.this"]}} == config


def test_plain_checkpoints_have_nothing_to_say(small_bf16: Path) -> None:
    source = Checkpoint.open(small_bf16)
    assert config_contents(source, ["x"], []) == {}
    assert config_contents(source, ["x"], [], {"a": 1}) == {"config.json": b'{\n  "a": 1\n}\n'}
