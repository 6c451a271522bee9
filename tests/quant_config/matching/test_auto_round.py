"""AutoRound's extra_config and block names, case by case; tests/engine/test_matching.py holds them against vLLM itself."""

from typing import Any

import pytest

from mtpress.models.qwen3_5.engine import VL_ARCHITECTURE, EngineLinear, Part
from mtpress.quant_config.matching.auto_round import LayerConfig
from mtpress.quant_config.matching.matcher import Scheme

BODY = "model.language_model.layers"
LAYER = "language_model.model.layers.1."
BA, QKVZ, DOWN = f"{LAYER}linear_attn.in_proj_ba", f"{LAYER}linear_attn.in_proj_qkvz", f"{LAYER}mlp.down_proj"
A, B = f"{BODY}.1.linear_attn.in_proj_a", f"{BODY}.1.linear_attn.in_proj_b"
FC1, HEAD = "visual.blocks.0.mlp.linear_fc1", "language_model.lm_head"
WHOLE = {"bits": 16, "data_type": "fp"}


def content(extra: Any = None, blocks: Any = BODY) -> dict[str, Any]:
    said = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True, "packing_format": "auto_round:auto_gptq"}
    return (
        said | ({"extra_config": extra} if extra is not None else {}) | ({"block_name_to_quantize": blocks} if blocks is not None else {})
    )


def linear(prefix: str) -> EngineLinear:
    part: Part = "draft" if prefix.startswith("mtp.") else "vision" if prefix.startswith("visual.") else "body"
    return EngineLinear(prefix, (), part)


@pytest.mark.parametrize(
    ("extra", "blocks", "prefix", "expected"),
    [
        (None, BODY, DOWN, "quantized"),
        (None, BODY, FC1, "ignored"),
        (None, BODY, "mtp.layers.0.mlp.down_proj", "ignored"),
        (None, BODY, "mtp.fc", "ignored"),
        (None, BODY, HEAD, "ignored"),
        (None, f"{BODY},mtp.layers", "mtp.layers.0.mlp.down_proj", "quantized"),
        (None, f"{BODY},mtp.layers", "mtp.fc", "ignored"),
        (None, f"{BODY}, mtp.layers", "mtp.layers.0.mlp.down_proj", "ignored"),  # nothing is stripped
        (None, [BODY], DOWN, "quantized"),
        (None, "model.language_model", DOWN, "ignored"),  # not renamed, so it begins no name
        (None, None, FC1, "quantized"),
        (None, None, "mtp.fc", "quantized"),
        (None, None, HEAD, "ignored"),
        ({"lm_head": {"bits": 4}}, BODY, HEAD, "quantized"),  # by its ending
        ({A: WHOLE, B: WHOLE}, BODY, BA, "ignored"),
        ({A: WHOLE}, BODY, BA, "split"),
        ({".*in_proj_[ab]$": WHOLE}, BODY, BA, "ignored"),
        ({".*in_proj_a": WHOLE}, BODY, BA, "split"),
        ({r"model\.language_model\.layers\.1\.mlp.*": WHOLE}, BODY, DOWN, "quantized"),  # an expression is not renamed
        ({"mlp.down_proj": WHOLE}, BODY, DOWN, "ignored"),
        ({"down": WHOLE}, BODY, DOWN, "quantized"),
        ({"mtp.fc": {"data_type": "fp"}}, None, "mtp.fc", "ignored"),
        ({".*mtp.*": WHOLE, ".*visual.*": WHOLE}, None, FC1, "ignored"),
        ({"(": WHOLE}, BODY, DOWN, "quantized"),
    ],
)
def test_verdicts(extra: Any, blocks: Any, prefix: str, expected: str) -> None:
    assert LayerConfig(content(extra, blocks), VL_ARCHITECTURE).verdict(linear(prefix)) == expected


def test_schemes() -> None:
    held = LayerConfig(content({".*down_proj": {"bits": 8, "group_size": 32, "sym": False}}), VL_ARCHITECTURE)
    assert held.scheme(linear(DOWN)) == Scheme("int", 8, 32, False)
    assert held.scheme(linear(QKVZ)) == Scheme("int", 4, 128, True)
    assert held.scheme(linear("mtp.fc")) is None


def test_idle_entries() -> None:
    extra = {A: WHOLE, "mtp.fc": WHOLE, ".*visual.*": WHOLE, f"{BODY}.9.mlp.down_proj": WHOLE, "model.mtp.layers": WHOLE}
    held = LayerConfig(content(extra, f"{BODY},model.visual"), VL_ARCHITECTURE)
    linears = [linear(BA), linear(DOWN), linear("mtp.fc"), linear(FC1)]
    assert held.idle(linears, []) == [f"{BODY}.9.mlp.down_proj", "model.mtp.layers", "model.visual"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra_config": []}, None),
        ({"extra_config": ["mtp.fc"]}, "extra_config must be an object"),
        ({"extra_config": {"mtp.fc": 16}}, "'mtp.fc' must be an object"),
        ({"extra_config": {"mtp.fc": {"bits": "16"}}}, "bits of 'mtp.fc'"),
        ({"block_name_to_quantize": [["a"]]}, "block_name_to_quantize must be"),
        ({"bits": None}, "bits must be a number"),
    ],
)
def test_what_the_engine_cannot_read(change: dict[str, Any], said: str | None) -> None:
    odd = LayerConfig(content() | change, VL_ARCHITECTURE).malformed
    assert len(odd) == (said is not None)
    assert said is None or said in odd[0]
