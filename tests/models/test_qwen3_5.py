"""config.json as the family reads it: what no shape shows, and a forward computes with."""

from typing import Any

import pytest

from checkpoints import small_config
from mtpress.errors import InputError
from mtpress.models.qwen3_5 import num_mtp_layers, sizes

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
