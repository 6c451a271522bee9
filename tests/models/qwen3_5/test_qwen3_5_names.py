"""config.json as the family reads it: what no shape shows, and a forward computes with."""

from typing import Any

import pytest

from checkpoints import small_config
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.errors import InputError
from mtpress.models.qwen3_5.names import kept_modules, num_mtp_layers, sizes

ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}


def config(**changes: Any) -> dict[str, Any]:
    whole = small_config()
    whole["text_config"] |= changes
    return whole


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_parameters": ROPE},
        {"rope_parameters": {k: v for k, v in ROPE.items() if k != "mrope_section"}},
        {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 10_000}, "partial_rotary_factor": 1.0},
        {"rms_norm_eps": None, "rope_parameters": None},
    ],
)
def test_what_a_forward_can_compute_with(changes: dict[str, Any]) -> None:
    assert sizes(config(**changes))["hidden_size"] == 64


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": ROPE | {"rope_type": {}}}, "rope_type"),
        ({"rope_parameters": ROPE | {"rope_theta": 10**400}}, "rope_theta"),
        ({"rope_parameters": ROPE | {"rope_theta": True}}, "rope_theta"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 1.5}}, "partial_rotary_factor"),
        ({"rope_parameters": ROPE | {"mrope_section": [2, 1, 2]}}, "mrope_section"),
        ({"rope_parameters": ROPE | {"mrope_section": [5, -2, 1]}}, "mrope_section"),
    ],
)
def test_what_it_cannot(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"config.json: {key} is "):
        sizes(config(**changes))


@pytest.mark.parametrize(("value", "count"), [(1, 1), (2, 2), (0, 0), (-1, 0), ("1", 0), (True, 0), (None, 0)])
def test_a_count_of_draft_layers_is_positive(value: Any, count: int) -> None:
    assert num_mtp_layers(config(mtp_num_hidden_layers=value)) == count


def plain(*shape: int, dtype: str = "BF16") -> OutputTensor:
    return OutputTensor("", dtype, shape)


def test_modules_kept_whole_are_named_in_the_order_of_a_plan() -> None:
    layers = "model.language_model.layers."
    tensors = {
        f"{layers}10.linear_attn.in_proj_a.weight": plain(2, 64),
        f"{layers}9.linear_attn.conv1d.weight": plain(8, 1, 4),
        f"{layers}9.linear_attn.dt_bias": plain(2),
        f"{layers}9.input_layernorm.weight": plain(64),
        f"{layers}9.mlp.up_proj.weight": plain(96, 32, dtype="U8"),
        f"{layers}9.mlp.up_proj.weight_scale": plain(96, 4, dtype="F8_E4M3"),
        f"{layers}9.mlp.down_proj.qweight": plain(8, 64, dtype="I32"),
        "model.language_model.embed_tokens.weight": plain(288, 64),
        "model.language_model.norm.weight": plain(64),
        "mtp.norm.weight": plain(64),
        "mtp.fc.weight": plain(64, 128),
        "mtp.layers.0.mlp.up_proj.qweight": plain(8, 96, dtype="I32"),
        "model.visual.patch_embed.proj.weight": plain(32, 3, 2, 4, 4),
        "model.visual.patch_embed.proj.bias": plain(32),
        "model.visual.merger.norm.weight": plain(32),
        "lm_head.weight": plain(288, 64),
    }
    kept = ["lm_head", "model.language_model.embed_tokens", "model.visual.patch_embed.proj", "mtp.fc", "mtp.norm"]
    kept += [f"{layers}9.linear_attn.conv1d", f"{layers}10.linear_attn.in_proj_a"]
    assert kept_modules(tensors, "model.language_model.") == kept
    del tensors["lm_head.weight"]
    assert kept_modules(tensors, "model.language_model.") == kept  # tied to the embeddings
    tensors |= {"lm_head.weight": plain(288, 32, dtype="U8"), "lm_head.weight_scale": plain(288, 4, dtype="F8_E4M3")}
    assert kept_modules(tensors, "model.language_model.") == kept[1:]
