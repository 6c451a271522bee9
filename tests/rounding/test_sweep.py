"""The exact sweep: eleven candidates find what all 126 do."""

import pytest
import torch
from nvfp4_samples import BLOCK, SHAPES, blocks, error_of, laplace, normal, relative_mse

from mtpress.formats import nvfp4
from mtpress.rounding import four_over_six, scale_search, sweep
from mtpress.rounding.scale_search import Window

EVERY = Window(126, 126)


@pytest.mark.parametrize("shape", SHAPES)
def test_eleven_candidates_are_enough(shape: str) -> None:
    weight = blocks(shape, 60_000, seed=3)
    scale_2 = scale_search.global_scale(nvfp4.amax(weight))
    found = scale_search.search(weight, scale_2, sweep.WINDOW)
    every = scale_search.search(weight, scale_2, EVERY)
    assert torch.equal(found.view(torch.uint8), every.view(torch.uint8))


def test_the_samples_reach_the_ends_of_the_window_and_of_e4m3() -> None:
    """Or the test above would show little."""
    offsets, codes = set(), set()
    for shape in SHAPES:
        weight = blocks(shape, 60_000, seed=3)
        scale_2 = scale_search.global_scale(nvfp4.amax(weight))
        first = nvfp4.block_scales(weight, scale_2).view(torch.uint8).int()
        found = scale_search.search(weight, scale_2, EVERY).view(torch.uint8).int()
        offsets |= set((found - first)[first >= scale_search.NORMAL].tolist())
        codes |= set(found.flatten().tolist())
    assert offsets >= set(range(-2, 8)) and offsets <= set(range(-3, 8))
    assert codes >= set(range(2, 121))


@pytest.mark.parametrize("largest", [1.0, 300.0, 440.0, 448.0])
def test_scales_near_448_have_no_more_room_than_there_is(largest: float) -> None:
    """Under another group's global scale a block may have any of E4M3's scales, and 448 ends the window."""
    weight = torch.cat([blocks(shape, 2000) for shape in SHAPES])
    scale_2 = nvfp4.amax(weight) / (6 * largest)
    found = scale_search.search(weight, scale_2, sweep.WINDOW)
    assert torch.equal(found.view(torch.uint8), scale_search.search(weight, scale_2, EVERY).view(torch.uint8))


def test_the_best_of_all_scales_by_float64_errors() -> None:
    weight = torch.cat([blocks(shape, 150) for shape in SHAPES])
    group = {"up": weight}
    chosen = sweep.group_scales(group)
    least = torch.full((len(weight),), torch.inf, dtype=torch.float64)
    for code in range(1, 127):
        scales = torch.full((len(weight), 1), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        parts = scale_search.nearest_codes(group, chosen._replace(scales={"up": scales}))["up"]
        least = torch.minimum(least, error_of(weight, parts).square().sum(-1))
    found = error_of(weight, scale_search.nearest_codes(group, chosen)["up"]).square().sum(-1)
    assert (found <= least * (1 + 1e-5) + 1e-30).all()
    other = error_of(weight, scale_search.nearest_codes(group, four_over_six.group_scales(group))["up"]).square().sum(-1)
    assert (found <= other * (1 + 1e-5) + 1e-30).all()


TOLERANCE = 3e-5  # samples differ by 1e-5, and by as much where their largest number puts the block scales between E4M3's


@pytest.mark.parametrize(("draw", "expected"), [(normal, 0.00659), (laplace, 0.00679)])
def test_error_on_known_distributions(draw: object, expected: float) -> None:
    weight = {"up": draw(512_000).bfloat16().view(-1, 64 * BLOCK)}  # type: ignore[operator]
    found = scale_search.nearest_codes(weight, sweep.group_scales(weight))["up"]
    assert abs(relative_mse(weight["up"], found) - expected) < TOLERANCE
