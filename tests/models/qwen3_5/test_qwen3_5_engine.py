"""The linears that vLLM builds, by its names; tests/engine/test_ignore_model.py compares them with the real ones."""

import pytest

from checkpoints import PREFIX, small_config
from mtpress.errors import InputError
from mtpress.models.qwen3_5.engine import TEXT_ARCHITECTURE, VL_ARCHITECTURE, EngineLinear, linears
from mtpress.models.qwen3_5.names import MTP_TENSORS


def test_every_linear_of_a_small_model() -> None:
    found = {linear.prefix: linear for linear in linears(small_config(), VL_ARCHITECTURE, PREFIX) if linear.part != "draft"}
    gdn, attention = "language_model.model.layers.0.", "language_model.model.layers.3."
    assert [name.removeprefix(gdn) for name in found if name.startswith(gdn)] == [
        "linear_attn.in_proj_qkvz", "linear_attn.out_proj", "linear_attn.in_proj_ba", "mlp.gate_up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert [name.removeprefix(attention) for name in found if name.startswith(attention)] == [
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert [name for name in found if name.startswith("visual.")] == [
        "visual.blocks.0.attn.qkv", "visual.blocks.0.attn.proj", "visual.blocks.0.mlp.linear_fc1", "visual.blocks.0.mlp.linear_fc2",
        "visual.merger.linear_fc1", "visual.merger.linear_fc2",
    ]  # fmt: skip
    assert found[f"{gdn}linear_attn.in_proj_ba"].modules == (
        f"{PREFIX}layers.0.linear_attn.in_proj_b", f"{PREFIX}layers.0.linear_attn.in_proj_a",
    )  # fmt: skip
    assert found["language_model.lm_head"] == EngineLinear("language_model.lm_head", ("lm_head",), "lm_head")


def test_the_draft_takes_every_matrix_of_the_head() -> None:
    draft = [linear for linear in linears(small_config(), VL_ARCHITECTURE, PREFIX) if linear.part == "draft"]
    modules = {module for linear in draft for module in linear.modules} - {"lm_head"}
    assert modules == {name.removesuffix(".weight") for name in MTP_TENSORS if "proj" in name or "fc.weight" in name}


def test_a_text_model_has_no_tower_and_shorter_names() -> None:
    config = small_config()["text_config"]
    found = {linear.prefix for linear in linears(config, TEXT_ARCHITECTURE, "model.")}
    assert "model.layers.0.mlp.down_proj" in found
    assert "lm_head" in found
    assert not any("visual" in name or name.startswith("language_model.") for name in found)


def test_a_config_without_sizes() -> None:
    with pytest.raises(InputError, match="num_hidden_layers"):
        list(linears({"vision_config": {}}, VL_ARCHITECTURE, PREFIX))
