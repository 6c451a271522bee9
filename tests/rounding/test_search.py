"""Searched INT4 scales: near the best there is, never worse than plain rounding. The kernels: tests/formats/test_int4_kernel.py."""

import math

import pytest
import torch
from int4_samples import GROUP, hard, relative_mse, sample
from torch import Tensor

from mtpress.formats import int4, int4_kernel
from mtpress.rounding import rtn, search

compiled = pytest.mark.skipif(not int4_kernel.KERNELS, reason="installed without a C compiler")


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


def test_other_dtypes_and_views_go_through_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = sample("normal", 4, seed=5)
    assert not int4_kernel.takes(weight.float()) and not int4_kernel.takes(weight.t())
    codes, scales = search.round_matrix(weight.float())
    expected = search.round_matrix(weight)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    columns = sample("normal", 256, 4).t()
    assert torch.equal(search.round_matrix(columns)[0], search.round_matrix(columns.contiguous())[0])
    monkeypatch.setattr(search, "PIECE_GROUPS", 3)
    assert torch.equal(search.round_matrix(weight, int4.EAGER)[0], expected[0])


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
    codes, scales = search.round_matrix(weight, int4.EAGER)
    assert codes[:2, :GROUP].unique().tolist() == [8]
    assert scales.abs().min() == search.LEAST_SCALE == torch.tensor(rtn.LEAST_SCALE).half()
    assert not scales.isnan().any()
    assert int4.dequantize(*int4.tensors(codes, scales).values())[:2, :GROUP].count_nonzero() == 0


def test_what_is_not_finite_shows_in_its_scale_alone() -> None:
    _, scales = search.round_matrix(hard(finite=False), int4.EAGER)
    assert scales[:, 1].isfinite().all()
    assert scales[:, 0].isnan().nonzero().flatten().tolist() == [13, 14, 15]
    _, scales = search.round_matrix(torch.full((1, 128), 1e6, dtype=torch.bfloat16), int4.EAGER)
    assert scales.isinf().all()
