"""compressed-tensors' groups and ignore list, case by case; tests/engine/test_matching.py holds them against vLLM itself."""

from typing import Any

import pytest

from mtpress.models.qwen3_5.engine import VL_ARCHITECTURE, EngineLinear, Part
from mtpress.quant_config.matching.compressed_tensors import ConfigGroups, scheme_of
from mtpress.quant_config.matching.matcher import Scheme

LAYER = "language_model.model.layers.1."
BA, QKV, DOWN = f"{LAYER}linear_attn.in_proj_ba", f"{LAYER}self_attn.qkv_proj", f"{LAYER}mlp.down_proj"
A, B = "model.language_model.layers.1.linear_attn.in_proj_a", "model.language_model.layers.1.linear_attn.in_proj_b"
FC1, HEAD = "visual.blocks.0.mlp.linear_fc1", "language_model.lm_head"
NVFP4 = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True}


def content(ignore: Any, targets: Any = ("Linear",)) -> dict[str, Any]:
    groups = {"group_0": {"targets": list(targets), "weights": NVFP4, "input_activations": NVFP4}}
    return {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": groups, "ignore": ignore}


def linear(prefix: str, part: Part = "body") -> EngineLinear:
    return EngineLinear(prefix, (), part)


@pytest.mark.parametrize(
    ("ignore", "prefix", "expected"),
    [
        ([A, B], BA, "ignored"),
        ([A], BA, "split"),
        (["re:.*in_proj_a$"], BA, "split"),
        (["re:.*in_proj_[ab]$"], BA, "ignored"),
        (["re:.*in_proj_ba"], BA, "ignored"),
        (["in_proj_a", "in_proj_b"], BA, "quantized"),  # whole names, not parts of them
        (["*mlp*"], DOWN, "quantized"),  # no globs
        (["model.language_model.layers.1.mlp.down_proj"], DOWN, "ignored"),
        (["re:model.language_model.layers.1.mlp.down_proj"], DOWN, "quantized"),  # expressions are not renamed
        (["re:.*visual.*"], FC1, "ignored"),
        (["re:visual.*"], FC1, "ignored"),
        (["re:model.visual.*"], FC1, "quantized"),
        ([], HEAD, "ignored"),  # "Linear" is no part of ParallelLMHead
        (["re:("], DOWN, "quantized"),
    ],
)
def test_ignore(ignore: list[str], prefix: str, expected: str) -> None:
    assert ConfigGroups(content(ignore), VL_ARCHITECTURE).verdict(linear(prefix)) == expected


@pytest.mark.parametrize(
    ("targets", "prefix", "expected"),
    [
        (["re:.*mlp.*"], DOWN, "quantized"),
        (["re:.*mlp.*"], QKV, "ignored"),
        (["model.language_model.layers.1.mlp.down_proj"], DOWN, "quantized"),
        (["re:.*[qkv]_proj"], QKV, "quantized"),
        (["re:.*q_proj"], QKV, "ignored"),  # a target must match every shard
        (["RowParallelLinear"], DOWN, "quantized"),
        (["row"], DOWN, "quantized"),
        (["lm_head"], HEAD, "ignored"),
        (["re:.*lm_head"], HEAD, "quantized"),
        (["re:.*Attention"], DOWN, "ignored"),
        ([], DOWN, "ignored"),
    ],
)
def test_targets(targets: list[str], prefix: str, expected: str) -> None:
    assert ConfigGroups(content([], targets), VL_ARCHITECTURE).verdict(linear(prefix)) == expected


def test_the_draft_goes_by_the_same_groups() -> None:
    held = ConfigGroups(content(["re:^mtp.*"]), VL_ARCHITECTURE)
    assert held.verdict(linear("mtp.fc", "draft")) == held.verdict(linear("mtp.layers.0.mlp.gate_up_proj", "draft")) == "ignored"
    assert ConfigGroups(content(["mtp.fc"]), VL_ARCHITECTURE).verdict(linear("mtp.layers.0.mlp.down_proj", "draft")) == "quantized"


@pytest.mark.parametrize(
    ("group", "layout", "expected"),
    [
        ({"weights": NVFP4, "input_activations": NVFP4}, None, Scheme("nvfp4", 4, 16, True, True)),
        ({"weights": NVFP4}, None, Scheme("nvfp4", 4, 16)),
        ({"weights": INT4}, "pack-quantized", Scheme("int", 4, 128)),
        ({"weights": INT4 | {"symmetric": False}, "format": "pack-quantized"}, "mixed-precision", Scheme("int", 4, 128, False)),
        ({"weights": {"num_bits": 8, "type": "int", "group_size": -1}}, "pack-quantized", Scheme("int", 8, -1)),
        ({"weights": NVFP4 | {"group_size": 32}}, None, Scheme("other", 4, 32)),
        ({"weights": {"num_bits": 8, "type": "float"}}, "float-quantized", Scheme("fp8", 8, -1)),
        ({}, None, Scheme("other", 8, -1)),
    ],
)
def test_schemes(group: dict[str, Any], layout: str | None, expected: Scheme) -> None:
    assert scheme_of(group, layout) == expected


def test_idle_entries() -> None:
    ignore = ["lm_head", "re:.*mtp.*", A, "re:model.visual.*", "*in_proj_a*", "model.language_model.layers.1.linear_attn.conv1d"]
    held = ConfigGroups(content(ignore), VL_ARCHITECTURE)
    linears = [linear(BA), linear("mtp.fc", "draft"), linear("lm_head", "draft"), linear(FC1, "vision")]
    assert held.idle(linears, [f"{LAYER}linear_attn.conv1d"]) == ["re:model.visual.*", "*in_proj_a*"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ignore": "lm_head"}, "ignore must be a list"),
        ({"ignore": [None]}, "ignore must be a list"),
        ({"config_groups": []}, "config_groups must be an object"),
        ({"config_groups": {"g": {"targets": "Linear", "weights": NVFP4}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups.g.weights"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": INT4}}}, "pack-quantized"),
        ({"ignore": ["re:("]}, "no regular expression"),
    ],
)
def test_what_the_engine_cannot_read(change: dict[str, Any], said: str) -> None:
    (odd,) = ConfigGroups(content([]) | change, VL_ARCHITECTURE).malformed
    assert said in odd
