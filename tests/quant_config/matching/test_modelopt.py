"""modelopt's ignore lists, case by case. tests/engine/test_matching.py holds the same code against vLLM itself."""

import pytest

from mtpress.models.qwen3_5.engine import PACKED, RENAMES, TEXT_ARCHITECTURE, VL_ARCHITECTURE, EngineLinear, Part, packed
from mtpress.quant_config.matching.modelopt import IgnoreList, split_star
from mtpress.quant_config.matching.names import rename, shards_of

VL = VL_ARCHITECTURE
LAYER = "language_model.model.layers.1."
BA, QKV, DOWN = f"{LAYER}linear_attn.in_proj_ba", f"{LAYER}self_attn.qkv_proj", f"{LAYER}mlp.down_proj"
FC1 = "visual.blocks.0.mlp.linear_fc1"
A, B = "model.language_model.layers.1.linear_attn.in_proj_a", "model.language_model.layers.1.linear_attn.in_proj_b"

VERDICTS = [
    ([A, B], BA, "ignored"),
    ([A], BA, "split"),
    ([A, "*in_proj*"], BA, "split"),  # the exact match comes first, and refuses
    (["*in_proj_a*", "*in_proj_b*"], BA, "quantized"),
    (["*in_proj_ba"], BA, "ignored"),
    (["*self_attn.q_proj"], QKV, "quantized"),
    (["model.language_model.layers.1.self_attn.qkv_proj"], QKV, "ignored"),
    (["model.language_model.layers.1*"], "language_model.model.layers.13.mlp.down_proj", "ignored"),
    (["model.language_model.layers.1.*"], "language_model.model.layers.13.mlp.down_proj", "quantized"),
    (["model.language_model.layers.1.*"], DOWN, "ignored"),
    (["down_proj"], DOWN, "ignored"),
    (["layers.1.mlp"], DOWN, "ignored"),
    (["model.visual*"], FC1, "ignored"),
    (["*visual*"], FC1, "ignored"),
    (["visual"], FC1, "ignored"),
    (["model.visual"], FC1, "quantized"),
    (["*model.visual*"], FC1, "quantized"),
    (["model.visual.blocks.0.mlp.linear_fc1"], FC1, "ignored"),
    (["lm_head"], "language_model.lm_head", "ignored"),
    (["*lm_head*"], "language_model.lm_head", "ignored"),
    (["lm_head.weight"], "language_model.lm_head", "quantized"),
    (["*"], DOWN, "ignored"),
    ([""], DOWN, "ignored"),
    ([], DOWN, "quantized"),
]
DRAFT = [
    (["mtp*"], True, True),
    (["mtp.*"], True, True),
    (["*mtp*"], True, True),
    (["mtp"], True, True),
    (["mtp.layers.0*"], True, False),
    (["model.mtp*"], False, False),
    (["re:.*mtp.*"], False, False),
    (["mtp.fc"], False, True),
    (["mtp.layers.0.self_attn.q_proj", "mtp.layers.0.self_attn.k_proj", "mtp.layers.0.self_attn.v_proj"], True, False),
]


def linear(prefix: str, part: Part = "body") -> EngineLinear:
    return EngineLinear(prefix, (), part)


@pytest.mark.parametrize(("entries", "prefix", "expected"), VERDICTS)
def test_verdict_on_the_target(entries: list[str], prefix: str, expected: str) -> None:
    assert IgnoreList(entries, VL).verdict(linear(prefix)) == expected


@pytest.mark.parametrize(("entries", "layer", "fc"), DRAFT)
def test_verdict_on_the_draft(entries: list[str], layer: bool, fc: bool) -> None:
    held = IgnoreList(entries, VL)
    assert (held.verdict(linear("mtp.layers.0.self_attn.qkv_proj", "draft")) == "ignored") is layer
    assert (held.verdict(linear("mtp.fc", "draft")) == "ignored") is fc


def test_one_of_a_fused_pair_of_the_draft_is_refused() -> None:
    held = IgnoreList(["mtp.layers.0.mlp.gate_proj"], VL)
    assert held.verdict(linear("mtp.layers.0.mlp.gate_up_proj", "draft")) == "split"


def test_the_draft_knows_no_fused_gdn_linear() -> None:
    assert list(packed("draft", VL)) == ["qkv_proj", "gate_up_proj"]
    assert list(packed("body", VL)) == ["qkv_proj", "gate_up_proj", "qkv", "in_proj_qkvz", "in_proj_ba"]
    assert list(packed("body", TEXT_ARCHITECTURE)) == ["qkv_proj", "gate_up_proj", "in_proj_qkvz", "in_proj_ba"]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [("mtp*", ("mtp", "mtp.*")), ("mtp.*", ("mtp.*",)), ("*", ("*",)), ("**", ("*", "*.*")), ("", ("",)), ("a.b", ("a.b",))],
)
def test_split_star(entry: str, expected: tuple[str, ...]) -> None:
    assert split_star(entry) == expected


@pytest.mark.parametrize(
    ("architecture", "name", "expected"),
    [
        (VL_ARCHITECTURE, "model.language_model.layers.0.mlp", "language_model.model.layers.0.mlp"),
        (VL_ARCHITECTURE, "model.visual.merger", "visual.merger"),
        (VL_ARCHITECTURE, "lm_head", "lm_head"),
        (VL_ARCHITECTURE, "mtp.fc", "mtp.fc"),
        (TEXT_ARCHITECTURE, "model.language_model.layers.0.mlp", "model.layers.0.mlp"),
        (TEXT_ARCHITECTURE, "model.layers.0.mlp", "model.layers.0.mlp"),
    ],
)
def test_rename(architecture: str, name: str, expected: str) -> None:
    assert rename(name, RENAMES[architecture]) == expected


def test_shards() -> None:
    assert shards_of(BA, PACKED[VL]) == (f"{LAYER}linear_attn.in_proj_b", f"{LAYER}linear_attn.in_proj_a")
    assert shards_of(DOWN, PACKED[VL]) == ()


def test_idle_entries() -> None:
    linears = [linear(BA), linear(DOWN), linear("mtp.fc", "draft")]
    others = ["language_model.model.embed_tokens", f"{LAYER}linear_attn.conv1d"]
    working = [A, "mtp*", "model.language_model.embed_tokens", "*linear_attn.conv1d*", "*down_proj", "layers.1"]
    idle = ["*in_proj_a*", "re:.*mtp.*", "model.mtp.fc", "router"]
    held = IgnoreList([*working, *idle], VL)
    assert held.idle(linears, others) == idle
