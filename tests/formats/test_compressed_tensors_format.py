"""compressed-tensors' reciprocals against float64, for every significand there is; its config entry; what is refused."""

from typing import Any

import pytest
import torch

from mtpress.formats import compressed_tensors, nvfp4

# Positive normal float32 numbers: every significand at one exponent. Reciprocals scale with the exponent.
SIGNIFICANDS = (torch.arange(1 << 23, dtype=torch.int32) + 0x3F800000).view(torch.float32)


def neighbour(values: torch.Tensor, ulps: int) -> torch.Tensor:
    return (values.view(torch.int32) + ulps).view(torch.float32)


def test_a_reciprocal_is_the_nearest_float32() -> None:
    assert torch.equal(compressed_tensors.reciprocal(SIGNIFICANDS), (1 / SIGNIFICANDS.double()).float())


def test_how_many_scales_come_back_and_that_no_neighbour_does_better() -> None:
    there = compressed_tensors.reciprocal(SIGNIFICANDS)
    back = compressed_tensors.reciprocal(there)
    away = back != SIGNIFICANDS
    assert away.sum() == 1_439_258  # of 8,388,608: 17.2 %
    assert SIGNIFICANDS[away].min() > 2**0.5
    assert ((back.view(torch.int32) - SIGNIFICANDS.view(torch.int32)).abs() <= 1).all()
    for ulps in (-2, -1, 1, 2):
        assert not (compressed_tensors.reciprocal(neighbour(there[away], ulps)) == SIGNIFICANDS[away]).any()
    assert torch.equal(compressed_tensors.reciprocal(back), there)  # what has been there and back stays
    difference = compressed_tensors.returns(SIGNIFICANDS)
    assert torch.equal(difference > 0, away) and difference.max() < 2**-23


@pytest.mark.parametrize("exponent", [-60, -12, 0, 9, 60])
def test_the_exponent_does_not_matter(exponent: int) -> None:
    sample = SIGNIFICANDS[::4099]
    assert torch.equal(compressed_tensors.returns(sample * 2.0**exponent) > 0, compressed_tensors.returns(sample) > 0)


def test_every_tensor_of_a_linear_has_a_name() -> None:
    assert compressed_tensors.OF_MODELOPT.keys() == nvfp4.output_tensors((2, 16)).keys()
    assert set(compressed_tensors.RECIPROCAL) == {nvfp4.SCALE_2, nvfp4.INPUT_SCALE}


def test_what_it_writes_is_nvfp4() -> None:
    for weight_only in (False, True):
        for fp8 in (False, True):
            config = compressed_tensors.quantization_config(["lm_head"], weight_only=weight_only, kv_cache_fp8=fp8)
            assert compressed_tensors.departure(config) is None
            assert config["ignore"] == ["lm_head"] and (config["kv_cache_scheme"] is not None) == fp8
            assert (config["config_groups"]["group_0"]["input_activations"] is None) == weight_only
    assert compressed_tensors.quantization_config([], lm_head=True)["config_groups"]["group_0"]["targets"][1] == r"re:.*lm_head$"


def changed(**keys: Any) -> dict[str, Any]:
    return compressed_tensors.quantization_config([], kv_cache_fp8=True) | keys


def in_group(**keys: Any) -> dict[str, Any]:
    config = compressed_tensors.quantization_config([])
    config["config_groups"]["group_0"] |= keys
    return config


def several_groups() -> dict[str, Any]:
    groups = [
        compressed_tensors.nvfp4_group(["re:.*mlp.*"], weight_only=True),
        compressed_tensors.nvfp4_group(["re:.*attn.*"]),
        compressed_tensors.fp8_group(["lm_head"], "tensor", static=True),
    ]
    return compressed_tensors.grouped_config(groups, [])


def test_groups_of_several_formats_do_not_depart() -> None:
    assert compressed_tensors.departure(several_groups()) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "no config_groups"),
        (changed(config_groups=[]), "no config_groups"),
        (changed(config_groups={"group_0": None}), "no config_groups"),
        (changed(transform_config={"config_groups": {"a": 1}}), "a transform_config"),
        (changed(sparsity_config={"format": "dense"}), "a sparsity_config"),
        (in_group(weights=None), "weights in group_0 that are neither NVFP4 nor FP8"),
        (in_group(weights={"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True}), "weights in group_0"),
        (in_group(input_activations={"num_bits": 8, "type": "float"}), "input_activations in group_0"),
        (in_group(output_activations={"num_bits": 8}), "output_activations in group_0"),
        (changed(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True}), "strategy 'attn_head'"),
    ],
)
def test_what_departs_from_nvfp4_and_fp8_is_named(config: dict[str, Any], said: str) -> None:
    assert said in (compressed_tensors.departure(config) or "")
