"""The local Hessian: against its definition, and bit for bit the same however samples are dealt out."""

import itertools

import pytest
import torch

from mtpress.calibration.block_hessian import PIECE_TOKENS, InputHessian


def samples(count: int = 6, width: int = 48) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(10.0 ** (i - 3) * torch.randn(1, 5 + 47 * i, width, generator=generator)).bfloat16() for i in range(count)]


def hessian_of(inputs: list[torch.Tensor]) -> InputHessian:
    hessian = InputHessian()
    for one in inputs:
        hessian.add("x", one)
    return hessian


def test_it_is_the_sum_of_outer_products() -> None:
    assert max(len(s[0]) for s in samples()) > PIECE_TOKENS
    found = hessian_of(samples()).total("x")
    tokens = torch.cat([s[0] for s in samples()]).double()
    for block in range(3):
        part = tokens[:, 16 * block : 16 * block + 16]
        exact = part.T @ part
        torch.testing.assert_close(found[block], exact, rtol=0, atol=1e-6 * float(exact.diagonal().min()))


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_any_dealing_and_order_gives_the_same_bits(workers: int) -> None:
    whole = hessian_of(samples())
    shares = [hessian_of(list(reversed(samples()))[number::workers]) for number in range(workers)]
    for order in itertools.islice(itertools.permutations(shares), 6):
        merged = InputHessian()
        for share in order:
            merged.merge(share.parts)
        assert torch.equal(merged.total("x"), whole.total("x"))


def test_plain_sums_would_not_do() -> None:
    parts = [inputs[0].double().T @ inputs[0].double() for inputs in samples()]
    assert not torch.equal(sum(parts), sum(reversed(parts)))  # type: ignore[arg-type]


def test_memory_does_not_grow_with_samples() -> None:
    whole, fractions = hessian_of(samples()).parts["x"]
    assert whole.shape == fractions.shape == (3, 16, 16)
    assert torch.equal(whole, whole.round()) and (fractions.abs() <= len(samples())).all()


@pytest.mark.parametrize("width", [5120, 17408])
def test_threads_do_not_change_the_bits(width: int) -> None:
    inputs = torch.randn(1, 333, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(hessian_of([inputs]).total("x"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
