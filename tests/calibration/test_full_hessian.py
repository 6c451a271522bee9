"""The whole Hessian: against its definition, and the same bits whatever order samples come in."""

import itertools

import pytest
import torch

from mtpress.calibration import full_hessian
from mtpress.calibration.block_hessian import BLOCK, InputHessian
from mtpress.calibration.full_hessian import FullHessian

CPU = torch.device("cpu")


def samples(count: int = 4, width: int = 80) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(10.0 ** (i - 2) * torch.randn(1, 5 + 7 * i, width, generator=generator)).bfloat16() for i in range(count)]


def total(order: list[int], inputs: list[torch.Tensor]) -> torch.Tensor:
    hessian = FullHessian(inputs[0].shape[-1], order, CPU)
    for number in order:
        hessian.add(number, inputs[number])
    return hessian.total()


@pytest.mark.parametrize(("panel", "tokens"), [(1024, 2048), (32, 2048), (32, 9)])
def test_it_is_the_sum_of_outer_products(panel: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_hessian, "PANEL", panel)
    monkeypatch.setattr(full_hessian, "TOKENS", tokens)
    x = torch.cat([s[0] for s in samples()]).double()
    found = total([0, 1, 2, 3], samples())
    torch.testing.assert_close(found.double(), x.T @ x, rtol=1e-5, atol=1e-5 * float(x.square().sum(0).max()))
    assert torch.equal(found, found.T)


def test_its_blocks_are_those_of_the_local_hessian() -> None:
    local = InputHessian()
    for inputs in samples():
        local.add("x", inputs)
    found = total([0, 1, 2, 3], samples())
    for block, expected in enumerate(local.total("x")):
        part = slice(BLOCK * block, BLOCK * block + BLOCK)
        torch.testing.assert_close(found[part, part].double(), expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_any_order_gives_the_same_bits() -> None:
    inputs = samples()
    orders = list(itertools.permutations(range(4)))
    found = [total(list(order), inputs) for order in orders]
    assert all(torch.equal(found[0], other) for other in found)
    # of sums as they come that is not so
    sums = []
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        running = torch.zeros(80, 80)
        for number in order:
            running += inputs[number][0].float().T @ inputs[number][0].float()
        sums.append(running)
    assert not torch.equal(*sums)


def test_only_the_samples_that_were_named_and_each_once() -> None:
    hessian = FullHessian(80, [0, 2], CPU)
    with pytest.raises(AssertionError):
        hessian.add(1, samples()[1])
    hessian.add(2, samples()[2])
    with pytest.raises(AssertionError):
        hessian.add(2, samples()[2])
    with pytest.raises(AssertionError):
        hessian.total()
    hessian.add(0, samples()[0])
    assert torch.equal(hessian.total(), total([0, 2], samples()))
