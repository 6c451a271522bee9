"""The local Hessian: against its definition, and bit for bit the same however samples are dealt out."""

import itertools

import pytest
import torch

from mtpress.input_hessian import InputHessian


def samples(count: int = 6, width: int = 48) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(10.0 ** (i - 3) * torch.randn(1, 5 + 7 * i, width, generator=generator)).bfloat16() for i in range(count)]


def test_it_is_the_sum_of_outer_products() -> None:
    hessian = InputHessian()
    for number, inputs in enumerate(samples()):
        hessian.add("mlp.down_proj", number, inputs)
    tokens = torch.cat([s[0] for s in samples()]).double()
    for block in range(3):
        part = tokens[:, 16 * block : 16 * block + 16]
        torch.testing.assert_close(hessian.total("mlp.down_proj")[block], part.T @ part, rtol=1e-12, atol=0)


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_any_dealing_and_order_gives_the_same_bits(workers: int) -> None:
    whole = InputHessian()
    for number, inputs in enumerate(samples()):
        whole.add("x", number, inputs)
    shares = [InputHessian() for _ in range(workers)]
    for number, inputs in reversed(list(enumerate(samples()))):
        shares[number % workers].add("x", number, inputs)
    for order in itertools.islice(itertools.permutations(shares), 6):
        merged = InputHessian()
        for share in order:
            merged.merge(share.partial)
        assert torch.equal(merged.total("x"), whole.total("x"))


def test_a_plain_running_sum_would_not_do() -> None:
    parts = [InputHessian() for _ in samples()]
    for number, inputs in enumerate(samples()):
        parts[number].add("x", number, inputs)
    forward = sum(part.total("x") for part in parts)
    backward = sum(part.total("x") for part in reversed(parts))
    assert not torch.equal(forward, backward)  # type: ignore[arg-type]


def test_a_sample_counts_once() -> None:
    one, other = InputHessian(), InputHessian()
    one.add("x", 0, samples()[0])
    other.add("x", 0, samples()[0])
    with pytest.raises(AssertionError, match="counted twice"):
        one.merge(other.partial)


@pytest.mark.parametrize("width", [5120, 17408])
def test_threads_do_not_change_the_bits(width: int) -> None:
    inputs = torch.randn(1, 333, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            hessian = InputHessian()
            hessian.add("x", 0, inputs)
            found.append(hessian.total("x"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
