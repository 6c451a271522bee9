"""Searched INT4 scales: near the best there is, never worse than plain rounding, and the same bits from every kernel."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_samples import GROUP, hard, relative_mse, sample
from torch import Tensor

from mtpress.formats import _int4_search as extension
from mtpress.formats import int4
from mtpress.rounding import rtn, search, search_kernel

KERNELS = search_kernel.KERNELS
compiled = pytest.mark.skipif(not KERNELS, reason="installed without a C compiler")


def assert_equal_bits(weight: Tensor, kernel: str) -> None:
    codes, scales = search.round_matrix(weight, search.EAGER)
    found = search.round_matrix(weight, kernel)
    assert found[0].dtype == torch.uint8 and found[1].dtype == torch.float16
    assert torch.equal(found[1].view(torch.int16), scales.view(torch.int16))
    assert torch.equal(found[0], codes)


def dense(weight: Tensor, signs: tuple[int, ...] = (1, -1)) -> float:
    """Relative squared error of the best of 400 FP16 scales a sign, from .3 to 1.1 of amax/7.5; without mtpress's arithmetic."""
    groups = weight.double().view(-1, GROUP)
    amax, least = groups.abs().amax(-1), torch.full((len(groups),), math.inf, dtype=torch.float64)
    for sign in signs:
        for fraction in torch.linspace(0.3, 1.1, 400).tolist():
            scale = (sign * fraction * amax / 7.5).half().double().unsqueeze(-1)
            error = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)
            least = torch.minimum(least, error)
    return float(least.sum() / groups.square().sum())


def test_the_build_has_a_kernel_wherever_there_is_a_compiler() -> None:
    assert KERNELS or not shutil.which("cc"), "the extension is not built: install the project again"
    assert search.kernel() == (KERNELS[0] if KERNELS else "eager")
    assert not KERNELS or KERNELS[-1] == "generic"


@compiled
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("finite", [True, False])
def test_kernels_give_the_bits_of_the_definition(kernel: str, finite: bool) -> None:
    assert_equal_bits(hard(finite), kernel)
    assert_equal_bits(sample("laplace", 32, seed=2), kernel)


@compiled
@given(st.binary(min_size=256, max_size=256), st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_kernels_give_the_bits_of_the_definition_on_any_bytes(content: bytes, kind: int) -> None:
    bits = torch.frombuffer(bytearray(content), dtype=torch.int16).clone()
    if kind:  # finite; and of one magnitude
        bits &= ~0x0080
        bits = bits & ~0x7800 | 0x3800 if kind == 2 else bits
    for kernel in KERNELS:
        assert_equal_bits(bits.view(torch.bfloat16).view(1, GROUP), kernel)


@compiled
def test_threads_and_pieces_join(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sample("normal", 64, seed=4)
    whole = search.round_matrix(weight)
    monkeypatch.setattr(search_kernel, "PIECE_GROUPS", 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for found, expected in zip(search.round_matrix(weight), whole, strict=True):
        assert torch.equal(found, expected)
    monkeypatch.setattr(search, "PIECE_GROUPS", 7)
    for found, expected in zip(search.round_matrix(weight, search.EAGER), whole, strict=True):
        assert torch.equal(found, expected)


@compiled
def test_kernels_refuse_what_does_not_fit() -> None:
    weight = sample("normal", 32)
    with pytest.raises(ValueError, match="no kernel 'sse9'"):
        search.round_matrix(weight, "sse9")
    pieces = [torch.zeros(size, dtype=torch.uint8).numpy() for size in (512, 128, 2, 192)]
    with pytest.raises(ValueError, match="256 bytes of weight"):
        extension.search("generic", *pieces)


def test_other_dtypes_and_views_go_through_the_definition() -> None:
    weight = sample("normal", 4, seed=5)
    assert not search_kernel.takes(weight.float()) and not search_kernel.takes(weight.t())
    codes, scales = search.round_matrix(weight.float())
    expected = search.round_matrix(weight)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    columns = sample("normal", 256, 4).t()
    assert torch.equal(search.round_matrix(columns)[0], search.round_matrix(columns.contiguous())[0])


@compiled
@pytest.mark.parametrize(("kind", "best", "tolerance"), [("normal", 0.00930, 5e-5), ("laplace", 0.01715, 2e-4)])
def test_error_on_known_distributions(kind: str, best: float, tolerance: float) -> None:
    """Gaussian and Laplace numbers whose best scales of both signs leave this much; Laplace samples differ by half a percent."""
    weight = sample(kind, 20000, seed=1)
    assert abs(relative_mse(weight, *search.round_matrix(weight)) - best) < tolerance
    some = weight[:500]
    assert relative_mse(some, *search.round_matrix(some)) < 1.001 * dense(some)
    assert relative_mse(some, *search.round_matrix(some)) < 0.93 * dense(some, (1,))


@compiled
def test_heavy_tails_are_cut_where_that_is_less_error() -> None:
    weight = sample("normal", 512, seed=6)
    weight.view(-1, GROUP)[:, 3] = 0.09  # one outlier a group, at 4.5 of its standard deviations
    assert relative_mse(weight, *search.round_matrix(weight)) < 1.002 * dense(weight)


@compiled
def test_no_group_is_worse_than_plain_rounding() -> None:
    for weight in (sample("normal", 500, seed=8), sample("laplace", 500, seed=9), hard()[[0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12]]):
        groups = weight.view(-1, GROUP).double()

        def errors(codes: Tensor, scales: Tensor, groups: Tensor = groups) -> Tensor:
            return ((codes.view(-1, GROUP).double() - 8) * scales.view(-1, 1).double() - groups).square().sum(-1)

        searched, plain = errors(*search.round_matrix(weight)), errors(*rtn.round_matrix(weight))
        assert (searched <= plain * (1 + 1e-5) + 1e-7 * groups.square().sum(-1)).all()  # sums are float32
        assert (searched < 0.99 * plain).any()


def test_groups_of_zeros_stay_zeros_and_tiny_ones_have_a_scale() -> None:
    weight = hard()
    codes, scales = search.round_matrix(weight, search.EAGER)
    assert codes[:2, :GROUP].unique().tolist() == [8]
    assert scales.abs().min() == search.LEAST_SCALE == torch.tensor(rtn.LEAST_SCALE).half()
    assert not scales.isnan().any()
    assert int4.dequantize(*int4.tensors(codes, scales).values())[:2, :GROUP].count_nonzero() == 0


def test_what_is_not_finite_shows_in_its_scale_alone() -> None:
    _, scales = search.round_matrix(hard(finite=False), search.EAGER)
    assert scales[:, 1].isfinite().all()
    assert scales[:, 0].isnan().nonzero().flatten().tolist() == [13, 14, 15]
    _, scales = search.round_matrix(torch.full((1, 128), 1e6, dtype=torch.bfloat16), search.EAGER)
    assert scales.isinf().all()
