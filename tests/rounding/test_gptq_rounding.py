"""GPTQ at fixed scales: against the paper's own loop in float64, and what it must leave of the output's error."""

import pytest
import torch
from torch import Tensor

from mtpress.errors import InputError
from mtpress.formats import int4, nvfp4
from mtpress.plan.recipe import CHOICES, GPTQ_SCALES
from mtpress.rounding import gptq, rtn
from mtpress.rounding.gptq import FORMATS, SCALES, Factor, Scales, factorize, nearest, round_matrix
from mtpress.rounding.max import round_group

WITHOUT_DATA = {"nvfp4": "max", "int4": "rtn"}
BOTH = pytest.mark.parametrize("name", list(FORMATS))


def inputs(tokens: int, k: int, seed: int = 0, correlated: bool = True) -> Tensor:
    """float64 [tokens, k]; correlated: few directions have most of it, and some columns are far larger than the others."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=random, dtype=torch.float64)
    if correlated:
        x = x * 0.3 + torch.randn(tokens, 12, generator=random, dtype=torch.float64) @ torch.randn(
            12, k, generator=random, dtype=torch.float64
        )
        x[:, torch.randperm(k, generator=random)[: k // 50]] *= 20
    return x


def matrix(n: int, k: int, seed: int = 1) -> Tensor:
    return (0.02 * torch.randn(n, k, generator=torch.Generator().manual_seed(seed))).bfloat16()


def scales_of(weight: Tensor, name: str) -> Scales:
    return SCALES[name][WITHOUT_DATA[name]]({"w": weight}, torch.empty(0))["w"]


def values(codes: Tensor, scales: Scales, name: str) -> Tensor:
    """float64 [N, K] of what codes stand for."""
    form = FORMATS[name]
    return form.decode(codes).double() * form.steps(scales).double().repeat_interleave(form.group_size, 1)


def error(weight: Tensor, codes: Tensor, scales: Scales, hessian: Tensor, name: str) -> float:
    change = weight.double() - values(codes, scales, name)
    return float((change @ hessian.double() * change).sum())


def distance_to_tie(scaled: Tensor, name: str) -> Tensor:
    """How far numbers are from where the nearest code changes."""
    bounds = torch.tensor(nvfp4.BOUNDS if name == "nvfp4" else [i + 0.5 for i in range(-8, 7)], dtype=torch.float64)
    scaled = scaled.abs() if name == "nvfp4" else scaled
    return (scaled.unsqueeze(-1) - bounds).abs().amin(-1)


def by_the_paper(weight: Tensor, scales: Scales, hessian: Tensor, name: str, damping: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    """Codes by algorithm 1 of arXiv:2210.17323, by rows of the Cholesky factor of the inverse; what was rounded [N, K]; the order."""
    form = FORMATS[name]
    steps = form.steps(scales).double().repeat_interleave(form.group_size, 1)
    k = len(hessian)
    order = hessian.diagonal().argsort(stable=True).flip(0)
    damped = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(k)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left, steps = weight.double()[:, order], steps[:, order]
    codes, scaled = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(weight.shape, dtype=torch.float64)
    for i in range(k):
        scaled[:, i] = left[:, i] / steps[:, i]
        codes[:, i] = form.encode(scaled[:, i])
        change = (left[:, i] - form.decode(codes[:, i]).double() * steps[:, i]) / upper[i, i]
        left[:, i:] -= change.unsqueeze(1) * upper[i, i:]
    back = order.argsort()
    return codes[:, back], scaled[:, back], order


@BOTH
@pytest.mark.parametrize("k", [128, 384])  # one block of columns, and three
def test_codes_are_those_of_the_paper_s_loop(name: str, k: int) -> None:
    weight, x = matrix(40, k), inputs(900, k)
    scales, hessian = scales_of(weight, name), x.T @ x
    expected, *_ = by_the_paper(weight, scales, hessian, name)
    assert torch.equal(round_matrix(weight, scales, factorize(hessian.clone()), FORMATS[name]), expected)
    assert (nearest(weight, scales, FORMATS[name]) != expected).float().mean() > 0.1


@BOTH
def test_in_float32_a_row_differs_only_from_a_near_tie_on(name: str) -> None:
    weight, x = matrix(200, 384), inputs(900, 384)
    scales, hessian = scales_of(weight, name), x.T @ x
    expected, scaled, order = by_the_paper(weight, scales, hessian, name)
    codes = round_matrix(weight, scales, factorize(hessian.float()), FORMATS[name])
    differs = (codes != expected)[:, order]
    rows = differs.any(1).nonzero().flatten()
    assert len(rows) < 20
    first = differs[rows].int().argmax(1)
    assert bool((distance_to_tie(scaled[:, order][rows, first], name) < 1e-3).all())


@BOTH
def test_less_of_the_output_s_error_is_left(name: str) -> None:
    """Of inputs that go together a good part less, of others as much; on tokens that H knows and on others."""
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(4):
        weight = matrix(64, 256, seed)
        scales = scales_of(weight, name)
        plain = nearest(weight, scales, FORMATS[name])
        for correlated in ratios:
            x = inputs(4000, 256, seed, correlated)
            known, other = x[:2000].T @ x[:2000], x[2000:].T @ x[2000:]
            codes = round_matrix(weight, scales, factorize(known.float()), FORMATS[name])
            ratios[correlated] += [error(weight, codes, scales, h, name) / error(weight, plain, scales, h, name) for h in (known, other)]
    assert max(ratios[True]) < 0.65
    assert sum(ratios[False]) / len(ratios[False]) < 1.001


@BOTH
def test_inputs_that_do_not_go_together_leave_the_nearest_codes(name: str) -> None:
    weight = matrix(32, 256)
    scales = scales_of(weight, name)
    hessian = torch.rand(256, generator=torch.Generator().manual_seed(3)).diag()
    assert torch.equal(round_matrix(weight, scales, factorize(hessian), FORMATS[name]), nearest(weight, scales, FORMATS[name]))


def test_nearest_codes_are_those_of_the_formats() -> None:
    weight = matrix(48, 256)
    weight[0, :16] = 0
    made = round_group({"w": weight})["w"]
    scales = scales_of(weight, "nvfp4")
    stored = FORMATS["nvfp4"].store(nearest(weight, scales, FORMATS["nvfp4"]), scales)
    assert all(torch.equal(stored[key].view(torch.uint8), made[key].view(torch.uint8)) for key in (nvfp4.WEIGHT, nvfp4.SCALE))
    assert torch.equal(stored[nvfp4.SCALE_2], made[nvfp4.SCALE_2])
    codes, int4_scales = rtn.round_matrix(weight)
    assert torch.equal(scales_of(weight, "int4")[0], int4_scales)
    assert torch.equal(nearest(weight, (int4_scales,), FORMATS["int4"]), codes)


def test_ties_and_signs_of_nvfp4_are_its_own() -> None:
    """Without feedback: ties go to the even code, a negative number too small for a code keeps its sign, saturation at 6."""
    bounds = [b for bound in nvfp4.BOUNDS for b in (bound, -bound)]
    row = torch.tensor([6.0, -6.0, *bounds], dtype=torch.bfloat16).repeat(2, 1)
    row[1, :] *= 0.001
    scales: Scales = (torch.ones(2, 1).to(torch.float8_e4m3fn), torch.tensor(1.0))
    codes = round_matrix(row, scales, factorize(torch.eye(16)), FORMATS["nvfp4"])
    assert codes[0].tolist() == [7, 15, 0, 8, 2, 10, 2, 10, 4, 12, 4, 12, 6, 14, 6, 14]
    assert codes[1].tolist() == [0, 8] * 8


@BOTH
def test_stored_tensors_are_dequantized_to_what_was_meant(name: str) -> None:
    weight, x = matrix(64, 256), inputs(300, 256)
    scales, form = scales_of(weight, name), FORMATS[name]
    codes = round_matrix(weight, scales, factorize((x.T @ x).float()), form)
    stored = form.store(codes, scales)
    module = nvfp4 if name == "nvfp4" else int4
    kept = {key: shape for key, (_, shape) in module.output_tensors((64, 256)).items() if key != "input_scale"}
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == kept
    assert torch.equal(form.dequantize(stored).double(), values(codes, scales, name).float().double())


@BOTH
def test_columns_that_nothing_reads_get_their_nearest_codes(name: str) -> None:
    weight, x = matrix(32, 256), inputs(500, 256)
    dead = torch.tensor([0, 17, 18, 255])
    x[:, dead] = 0
    scales = scales_of(weight, name)
    codes = round_matrix(weight, scales, factorize((x.T @ x).float()), FORMATS[name])
    plain = nearest(weight, scales, FORMATS[name])
    assert torch.equal(codes[:, dead], plain[:, dead])
    assert not torch.equal(codes, plain)
    nothing = round_matrix(weight, scales, factorize(torch.zeros(256, 256)), FORMATS[name])
    assert torch.equal(nothing, plain)


@BOTH
def test_fewer_tokens_than_columns(name: str) -> None:
    """H is singular; on the few tokens it knows little is left."""
    weight, x = matrix(32, 384), inputs(20, 384, correlated=False)
    scales, hessian = scales_of(weight, name), x.T @ x
    codes = round_matrix(weight, scales, factorize(hessian.float()), FORMATS[name])
    assert error(weight, codes, scales, hessian, name) < 0.2 * error(weight, nearest(weight, scales, FORMATS[name]), scales, hessian, name)


def test_the_factor_is_of_the_damped_matrix_in_ascending_order() -> None:
    x = inputs(600, 200)
    hessian = x.T @ x
    factor = factorize(hessian.clone(), 0.1)
    assert torch.equal(factor.order, hessian.diagonal().argsort(stable=True))
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(200)
    torch.testing.assert_close(factor.lower @ factor.lower.T, damped[factor.order][:, factor.order])


def test_a_matrix_that_rounding_made_indefinite_is_damped_more() -> None:
    indefinite = torch.tensor([[1.0, 1.2], [1.2, 1.0]])
    factor = factorize(indefinite.clone(), 0.05)
    product = factor.lower @ factor.lower.T
    torch.testing.assert_close(product[0, 1], torch.tensor(1.2))
    assert product.diagonal().tolist() == pytest.approx([1.4, 1.4])  # 0.05, then 0.05, 0.1 and 0.2 more


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused(damage: float) -> None:
    hessian = torch.eye(4)
    hessian[2, 2] = damage
    with pytest.raises(InputError, match=f"mean square of what a linear reads is {damage}; the source weights are damaged"):
        factorize(hessian)


def test_recipes_name_the_scale_choices_there_are() -> None:
    assert {form: tuple(choices) for form, choices in SCALES.items()} == GPTQ_SCALES
    assert GPTQ_SCALES.keys() == FORMATS.keys() == {form for form, choices in CHOICES.items() if "gptq" in choices.rounding}
    assert gptq.DAMPING == 0.05
    assert isinstance(factorize(torch.eye(4)), Factor)
