"""Rounding by the largest magnitude: one global scale a group, and nothing that is not a number."""

import math

import pytest
import torch

from mtpress.formats import nvfp4
from mtpress.rounding.max import round_group, weight_amax


def matrix(rows: int, spread: float, seed: int) -> torch.Tensor:
    return (spread * torch.randn(rows, 64, generator=torch.Generator().manual_seed(seed))).to(torch.bfloat16)


@pytest.mark.parametrize("largest", [-7.5, 7.5])
def test_amax_is_the_largest_magnitude_of_the_group(largest: float) -> None:
    group = {"q": matrix(32, 0.1, 0), "k": matrix(16, 0.1, 1), "v": matrix(16, 0.1, 2)}
    group["k"][3, 5] = largest
    amax = weight_amax(group)
    assert amax.dtype == torch.float32 and amax.shape == () and float(amax) == 7.5


@pytest.mark.parametrize("damage", [math.inf, -math.inf, math.nan])
def test_one_number_that_is_none_shows_in_the_amax(damage: float) -> None:
    group = {"gate": matrix(32, 0.1, 0), "up": matrix(16, 0.1, 1)}
    assert torch.isfinite(weight_amax(group))
    group["gate"][31, 63] = damage
    amax = float(weight_amax(group))
    assert math.isnan(amax) if math.isnan(damage) else amax == math.inf


def test_a_group_shares_one_global_scale() -> None:
    group = {"gate": matrix(32, 1.0, 0), "up": matrix(48, 0.01, 1)}
    rounded = round_group(group)
    amax = max(float(weight.float().abs().max()) for weight in group.values())
    assert list(rounded) == ["gate", "up"]
    for name, weight in group.items():
        parts = rounded[name]
        scale_2 = parts["weight_scale_2"]
        assert scale_2.dtype == torch.float32 and scale_2 == torch.tensor(amax) / 2688
        packed, scales = nvfp4.quantize(weight, scale_2)
        assert torch.equal(parts["weight"], packed)
        assert torch.equal(parts["weight_scale"].view(torch.uint8), scales.view(torch.uint8))
    alone = round_group({"up": group["up"]})["up"]
    assert alone["weight_scale_2"] < rounded["up"]["weight_scale_2"]


def test_a_matrix_of_zeros_beside_another_keeps_the_others_scale() -> None:
    rounded = round_group({"gate": torch.zeros(16, 64, dtype=torch.bfloat16), "up": matrix(16, 1.0, 0)})
    assert rounded["gate"]["weight_scale_2"] == rounded["up"]["weight_scale_2"]
    assert not rounded["gate"]["weight"].any()
    assert (rounded["gate"]["weight_scale"].float() == 1).all()


def test_a_group_of_zeros_is_zeros_with_finite_positive_scales() -> None:
    for parts in round_group({name: torch.zeros(16, 64, dtype=torch.bfloat16) for name in ("gate", "up")}).values():
        assert not parts["weight"].any()
        assert (parts["weight_scale"].float() == 1).all()
        assert 0 < float(parts["weight_scale_2"]) < math.inf
        restored = nvfp4.dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
        assert torch.equal(restored, torch.zeros(16, 64))


@pytest.mark.parametrize("size", [1e-38, 1e-40])
def test_weights_near_the_smallest_bf16_stay_finite(size: float) -> None:
    parts = round_group({"up": matrix(16, size, 0)})["up"]
    assert float(parts["weight_scale_2"]) > 0
    assert not parts["weight_scale"].float().isnan().any()
    assert nvfp4.dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"]).isfinite().all()
