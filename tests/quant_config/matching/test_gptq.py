"""GPTQ's module list and dynamic patterns, case by case; tests/engine/test_matching.py holds them against vLLM itself."""

from typing import Any

import pytest

from mtpress.models.qwen3_5.engine import VL_ARCHITECTURE, EngineLinear, Part
from mtpress.quant_config.matching.gptq import ModuleList, quantized_modules
from mtpress.quant_config.matching.matcher import Scheme

BODY = "model.language_model.layers"
LAYER = "language_model.model.layers.1."
QKV, GATE_UP, DOWN = f"{LAYER}self_attn.qkv_proj", f"{LAYER}mlp.gate_up_proj", f"{LAYER}mlp.down_proj"
FC1, HEAD, MTP_DOWN = "visual.blocks.0.mlp.linear_fc1", "language_model.lm_head", "mtp.layers.0.mlp.down_proj"
PACKED = {f"{BODY}.1.mlp.{name}.{suffix}": "I32" for name in ("gate_proj", "up_proj", "down_proj") for suffix in ("qweight", "qzeros")}
DTYPES = PACKED | {f"{BODY}.1.self_attn.q_proj.weight": "BF16", "mtp.fc.weight": "BF16", "lm_head.weight": "BF16"}


def content(**keys: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False} | keys


def linear(prefix: str) -> EngineLinear:
    part: Part = "draft" if prefix.startswith("mtp.") else "vision" if prefix.startswith("visual.") else "body"
    return EngineLinear(prefix, (), part)


@pytest.mark.parametrize(
    ("keys", "prefix", "expected"),
    [
        ({}, DOWN, "quantized"),
        ({}, GATE_UP, "quantized"),
        ({}, QKV, "ignored"),
        ({}, MTP_DOWN, "ignored"),
        ({}, FC1, "ignored"),
        ({"modules_in_block_to_quantize": ["mlp.down_proj"]}, MTP_DOWN, "quantized"),
        ({"modules_in_block_to_quantize": ["mlp.down_proj"]}, GATE_UP, "ignored"),
        ({"modules_in_block_to_quantize": ["mlp.up_proj"]}, GATE_UP, "split"),
        ({"modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.gate_proj"]]}, GATE_UP, "quantized"),
        ({"modules_in_block_to_quantize": [f"{BODY}.1.mlp"]}, DOWN, "quantized"),
        ({"dynamic": {"-:.*mlp.*": {}}}, DOWN, "ignored"),
        ({"dynamic": {"-:mlp": {}}}, DOWN, "quantized"),  # held against the start
        ({"dynamic": {"+:.*mlp.*": {"bits": 8}, "-:.*mlp.*": {}}}, DOWN, "quantized"),  # the first counts
        ({"modules_in_block_to_quantize": ["mlp"], "dynamic": {"-:.*mtp": {}}}, MTP_DOWN, "ignored"),
        ({"modules_in_block_to_quantize": ["mlp"], "dynamic": {"-:nothing.like.mtp": {}}}, MTP_DOWN, "ignored"),
        ({"modules_in_block_to_quantize": ["fc"], "dynamic": {"-:nothing.like.mtp": {}}}, "mtp.fc", "quantized"),
        ({"modules_in_block_to_quantize": ["lm_head"]}, HEAD, "ignored"),
        ({"modules_in_block_to_quantize": ["lm_head"], "lm_head": True}, HEAD, "quantized"),
    ],
)
def test_verdicts(keys: dict[str, Any], prefix: str, expected: str) -> None:
    assert ModuleList(content(**keys), VL_ARCHITECTURE, DTYPES).verdict(linear(prefix)) == expected


def test_where_nothing_is_said_the_dtypes_decide() -> None:
    assert quantized_modules(DTYPES) == [f"{BODY}.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    everything = ModuleList(content(), VL_ARCHITECTURE, {"lm_head.weight": "BF16"})
    assert {everything.verdict(linear(prefix)) for prefix in (DOWN, QKV, MTP_DOWN, FC1, "mtp.fc")} == {"quantized"}


def test_schemes() -> None:
    held = ModuleList(content(dynamic={"+:.*down_proj": {"group_size": 32, "sym": False}}), VL_ARCHITECTURE, DTYPES)
    assert held.scheme(linear(DOWN)) == Scheme("int", 4, 32, False)
    assert held.scheme(linear(GATE_UP)) == Scheme("int", 4, 128, True)
    assert held.scheme(linear(QKV)) is None


def test_idle_entries() -> None:
    modules = ["mlp.down_proj", "block_sparse_moe", f"{BODY}.9.mlp"]
    dynamic: dict[str, Any] = {"-:.*mtp.*": {}, "-:.*router": {}, "+:language_model.*": {}, "-:mlp": {}}
    held = ModuleList(content(modules_in_block_to_quantize=modules, dynamic=dynamic), VL_ARCHITECTURE, DTYPES)
    idle = held.idle([linear(DOWN), linear("mtp.fc")], [])
    assert idle == ["block_sparse_moe", f"{BODY}.9.mlp", "-:.*router", "-:mlp"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"dynamic": None}, "dynamic must be an object"),
        ({"dynamic": {"-:(": {}}}, "no regular expression"),
        ({"dynamic": {"-:a": None}}, "'-:a' must be an object"),
        ({"modules_in_block_to_quantize": "mlp"}, "modules_in_block_to_quantize must be"),
    ],
)
def test_what_the_engine_cannot_read(keys: dict[str, Any], said: str) -> None:
    (odd,) = ModuleList(content(**keys), VL_ARCHITECTURE, DTYPES).malformed
    assert said in odd
