"""Scales by the local Hessian: what it minimises, that the window is enough, and what it does to inputs it has not seen."""

import pytest
import torch
from nvfp4_samples import BLOCK, SHAPES, blocks, error_of
from torch import Tensor

from mtpress.formats import nvfp4
from mtpress.rounding import four_over_six, hessian, scale_search, sweep
from mtpress.rounding.max import round_group
from mtpress.rounding.scale_search import Window


def inputs(num_tokens: int, num_blocks: int, seed: int) -> Tensor:
    """float64 [T, K] of one distribution: correlated channels of very different size, some of them outliers."""
    fixed, drawn = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    k = num_blocks * BLOCK
    mix = torch.eye(k) + 0.4 * torch.randn(k, k, generator=fixed) / k**0.5
    size = torch.exp(torch.randn(k, generator=fixed))
    size[torch.randperm(k, generator=fixed)[: k // 32]] *= 20
    return ((torch.randn(num_tokens, k, generator=drawn) @ mix) * size).double()


def second_moments(x: Tensor) -> Tensor:
    tokens = x.view(len(x), -1, BLOCK).transpose(0, 1)
    return tokens.mT @ tokens


def matrix(rows: int, num_blocks: int, seed: int = 0) -> Tensor:
    return (0.02 * torch.randn(rows, num_blocks * BLOCK, generator=torch.Generator().manual_seed(seed))).bfloat16()


def test_it_is_the_best_of_the_window_by_float64_errors() -> None:
    weight, cost = {"up": matrix(60, 4)}, hessian.cost(second_moments(inputs(200, 4, 1)))
    chosen = hessian.group_scales(weight, second_moments(inputs(200, 4, 1)))
    first = nvfp4.block_scales(weight["up"], chosen.scale_2).view(torch.uint8).int()

    def losses(scales: Tensor) -> Tensor:
        error = error_of(weight["up"], scale_search.nearest_codes(weight, chosen._replace(scales={"up": scales}))["up"])
        parts = error.view(60, 4, BLOCK)
        return torch.einsum("nbi,bij,nbj->nb", parts, cost, parts)

    window = [losses((first + i).clamp(max=126).to(torch.uint8).view(torch.float8_e4m3fn)) for i in range(-9, 8)]
    found, best = losses(chosen.scales["up"]), torch.stack(window).amin(0)
    # a number between two codes may be rounded to the other one than the search thought: w · (1/s) is not quite w / s
    assert ((found - best).abs() <= 1e-4 * best).double().mean() > 0.98
    assert 1 - 1e-6 <= float(found.sum() / best.sum()) <= 1.005


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "outlier"])
def test_by_the_diagonal_the_window_finds_what_all_126_do(shape: str) -> None:
    """Channels whose inputs differ by a factor of some ten."""
    weight = blocks(shape, 3000, seed=1).view(-1, 4 * BLOCK)
    size = torch.exp(torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(2))).double()
    form = scale_search.form_of(hessian.cost(torch.diag_embed(size.square())))
    scale_2 = scale_search.global_scale(nvfp4.amax(weight))
    found = scale_search.search(weight, scale_2, hessian.WINDOW, form)
    assert torch.equal(found.view(torch.uint8), scale_search.search(weight, scale_2, Window(126, 126), form).view(torch.uint8))


def test_by_the_whole_block_the_window_leaves_a_thousandth() -> None:
    weight, moments = {"up": matrix(400, 8)}, second_moments(inputs(2000, 8, 1))
    cost = hessian.cost(moments)
    every = scale_search.group_scales(weight, Window(126, 126), cost)
    window = hessian.group_scales(weight, moments)

    def loss(chosen: scale_search.GroupScales) -> float:
        error = error_of(weight["up"], scale_search.nearest_codes(weight, chosen)["up"]).view(400, 8, BLOCK)
        return float(torch.einsum("nbi,bij,nbj->", error, cost, error))

    assert loss(every) * (1 - 1e-6) <= loss(window) <= 1.002 * loss(every)


def test_a_block_of_which_nothing_was_read_is_swept() -> None:
    weight, moments = matrix(50, 2), second_moments(inputs(100, 2, 1))
    moments[1] = 0
    found = hessian.group_scales({"up": weight}, moments).scales["up"].view(torch.uint8)
    plain = sweep.group_scales({"up": weight}).scales["up"].view(torch.uint8)
    assert torch.equal(found[:, 1], plain[:, 1]) and not torch.equal(found[:, 0], plain[:, 0])


def test_the_size_of_the_inputs_does_not_matter() -> None:
    weight, moments = {"up": matrix(50, 2)}, second_moments(inputs(100, 2, 1))
    scales = [hessian.group_scales(weight, moments * factor).scales["up"].view(torch.uint8) for factor in (1.0, 2.0**-40, 2.0**40)]
    assert torch.equal(scales[0], scales[1]) and torch.equal(scales[0], scales[2])


def test_each_choice_changes_the_output_of_unseen_inputs_less_than_the_one_before() -> None:
    weight, unseen = {"up": matrix(256, 16)}, inputs(2000, 16, 2)
    made = {
        "max": round_group(weight)["up"],
        "four over six": scale_search.nearest_codes(weight, four_over_six.group_scales(weight))["up"],
        "sweep": scale_search.nearest_codes(weight, sweep.group_scales(weight))["up"],
        "hessian": scale_search.nearest_codes(weight, hessian.group_scales(weight, second_moments(inputs(2000, 16, 1))))["up"],
    }
    errors = {name: float((unseen @ error_of(weight["up"], parts).T).square().sum()) for name, parts in made.items()}
    assert errors["four over six"] < 0.9 * errors["max"]
    assert errors["sweep"] < 0.93 * errors["four over six"]
    assert errors["hessian"] < 0.9 * errors["sweep"]
