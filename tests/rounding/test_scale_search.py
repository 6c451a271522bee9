"""The search for block scales: the compiled kernel bit for bit against the definition, and the definition on blocks that are not alike."""

import itertools

import pytest
import torch
from nvfp4_samples import BLOCK, SHAPES, blocks, special
from torch import Tensor

from mtpress.formats import nvfp4, nvfp4_packing
from mtpress.rounding import hessian, scale_search, sweep
from mtpress.rounding.scale_search import SIX_OR_FOUR, Window

KERNELS = nvfp4_packing.KERNELS
compiled = pytest.mark.skipif(not KERNELS, reason="installed without a C compiler")


def form(num_blocks: int, seed: int = 0) -> Tensor:
    """Of inputs with strong correlations and channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(num_blocks, 40, 5, generator=generator) @ torch.randn(num_blocks, 5, BLOCK, generator=generator)
    inputs = (inputs * 10 ** torch.randn(num_blocks, 1, BLOCK, generator=generator)).double()
    return scale_search.form_of(hessian.cost(inputs.mT @ inputs))


def assert_same(weight: Tensor, window: Window, cost: Tensor | None, kernel: str) -> None:
    scale_2 = scale_search.global_scale(nvfp4.amax(weight))
    expected = scale_search.search(weight, scale_2, window, cost, nvfp4.EAGER)
    found = scale_search.search(weight, scale_2, window, cost, kernel)
    assert found.dtype == expected.dtype == torch.float8_e4m3fn
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [SIX_OR_FOUR, sweep.WINDOW, Window(12, 9)])
def test_kernels_give_the_definitions_bits(window: Window, kernel: str) -> None:
    for weight in [blocks(shape, 100) for shape in SHAPES] + list(special().values()):
        assert_same(weight, window, None, kernel)


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_give_the_definitions_bits_by_a_form(kernel: str) -> None:
    for shape in SHAPES:
        assert_same(blocks(shape, 130).view(65, 2 * BLOCK), hessian.WINDOW, form(2), kernel)
    for weight in special().values():
        assert_same(weight, hessian.WINDOW, form(1), kernel)


@compiled
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (1, 48), (3, 1008), (63, 16), (64, 32), (130, 48)])
def test_any_number_of_blocks_pieces_and_threads(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = blocks("spread", rows * columns // BLOCK).view(rows, columns)
    for piece, threads in itertools.product((1, 200), (1, 3)):
        monkeypatch.setattr(nvfp4_packing, "PIECE_BLOCKS", piece)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert_same(weight, Window(1, 1), None, KERNELS[0])
        assert_same(weight, Window(1, 0), form(columns // BLOCK), KERNELS[0])
    if rows < 5:
        monkeypatch.setattr(scale_search, "PIECE_BLOCKS", 1)
        assert_same(weight, Window(1, 1), form(columns // BLOCK), KERNELS[0])


@pytest.mark.parametrize("kernel", [*KERNELS, nvfp4.EAGER])
def test_a_blocks_scale_does_not_depend_on_what_is_beside_it(kernel: str) -> None:
    weight, cost = torch.cat([blocks(shape, 2) for shape in SHAPES[2:]]), form(1)
    scale_2 = scale_search.global_scale(nvfp4.amax(weight))
    for by in (None, cost):
        together = scale_search.search(weight, scale_2, hessian.WINDOW, by, kernel).view(torch.uint8)
        alone = [scale_search.search(row[None], scale_2, hessian.WINDOW, by, kernel).view(torch.uint8) for row in weight]
        assert torch.equal(together, torch.cat(alone))


def test_rests_are_those_of_the_nearest_numbers() -> None:
    sizes = torch.cat([torch.linspace(0, 12, 4801), torch.tensor([2 - 2.0**-23, 4 - 2.0**-22, 6 + 2.0**-21])])
    nearest = (sizes[:, None] - torch.tensor(nvfp4.E2M1_VALUES)).abs().min(-1).values
    assert torch.equal(scale_search._rest(sizes).abs(), nearest)


def test_the_form_is_the_matrix_in_half_the_products() -> None:
    cost = hessian.cost(torch.eye(BLOCK).double()[None] * 4 + torch.ones(1, BLOCK, BLOCK, dtype=torch.float64))
    error = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).double()
    half = scale_search.form_of(cost)[0].double()
    assert not half.triu(1).any()
    torch.testing.assert_close(error @ half @ error, error @ cost[0] @ error, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", special())
def test_special_blocks_have_finite_positive_scales_and_no_worse_errors(kind: str) -> None:
    weight = {"gate": special()[kind]}
    chosen = scale_search.group_scales(weight, sweep.WINDOW)
    scales = chosen.scales["gate"].float()
    assert torch.isfinite(scales).all() and (scales > 0).all() and 0 < float(chosen.scale_2) < float("inf")
    assert (scales[(weight["gate"] == 0).all(-1)] == 1).all()
    parts = scale_search.nearest_codes(weight, chosen)["gate"]
    plain = nvfp4.quantize(weight["gate"], chosen.scale_2)

    def error(packed: Tensor, scale: Tensor) -> Tensor:
        values = nvfp4.decode(nvfp4.unpack(packed)).double() * scale.double().repeat_interleave(BLOCK, 1) * chosen.scale_2.double()
        return (values - weight["gate"].double()).square().sum(-1)

    assert (error(parts["weight"], parts["weight_scale"]) <= error(*plain) * (1 + 1e-6)).all()


def test_a_group_shares_the_global_scale_of_its_largest_number() -> None:
    group = {"q": blocks("normal", 4), "k": blocks("normal", 6) * 0.01}
    group["q"][1, 1] = -7.5
    chosen = scale_search.group_scales(group, sweep.WINDOW)
    assert chosen.scale_2 == torch.tensor(7.5) / (6 * 256)
    rounded = scale_search.nearest_codes(group, chosen)
    assert list(rounded) == ["q", "k"] and all(parts["weight_scale_2"] is chosen.scale_2 for parts in rounded.values())


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
@pytest.mark.parametrize("by", [*KERNELS, nvfp4.EAGER])
def test_damage_shows_in_the_global_scale_and_does_no_harm(damage: float, by: str) -> None:
    weight = blocks("normal", 70)
    weight[3, 5] = damage
    chosen = scale_search.group_scales({"up": weight}, sweep.WINDOW)
    assert not torch.isfinite(chosen.scale_2)
    for cost in (None, form(1)):
        scale_search.search(weight, chosen.scale_2, hessian.WINDOW, cost, by)
