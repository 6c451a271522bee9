"""Plain INT4 rounding against its formula in float64; tests/oracles/test_autoround_format.py holds it to auto-round's own."""

import math

import pytest
import torch
from int4_samples import GROUP, hard, relative_mse, sample

from mtpress.formats import int4
from mtpress.rounding import rtn


@pytest.mark.parametrize("weight", [sample("normal", 40), sample("laplace", 40), hard()], ids=["normal", "laplace", "hard"])
def test_codes_are_the_nearest_under_the_scale_of_the_largest(weight: torch.Tensor) -> None:
    codes, scales = rtn.round_matrix(weight)
    groups = weight.double().view(-1, GROUP)
    for group, scale, code in zip(groups, scales.view(-1), codes.view(-1, GROUP), strict=True):
        largest = group[group.abs().argmax()]
        if bool((group == -largest).any()):
            largest = largest.abs()  # of two that are as large the positive one
        wanted = (-largest / 8).half()
        if abs(float(wanted)) < 1e-5:
            wanted = torch.tensor(1e-5 if float(largest) <= 0 or float(wanted) == 0 else -1e-5).half()
        assert scale == wanted
        scaled = (group / scale.double()).float()
        assert torch.equal(code.float() - 8, scaled.round().clamp(-8, 7))


def test_the_largest_number_of_a_group_is_met() -> None:
    weight = sample("normal", 64)
    stored = int4.tensors(*rtn.round_matrix(weight))
    found = int4.dequantize(*stored.values()).view(-1, GROUP)
    assert torch.equal(found.abs().amax(-1), weight.float().view(-1, GROUP).abs().amax(-1))  # BF16's mantissa is FP16's and to spare
    assert set(stored[int4.SCALES].sign().flatten().tolist()) == {-1.0, 1.0}


def test_groups_of_zeros_stay_zeros() -> None:
    codes, scales = rtn.round_matrix(torch.zeros(32, 128, dtype=torch.bfloat16))
    assert codes.unique().tolist() == [8]
    assert scales.unique().tolist() == [torch.tensor(1e-5).half().item()]


def test_what_is_not_finite_shows_in_its_scale_alone() -> None:
    _, scales = rtn.round_matrix(hard(finite=False))
    finite = scales.isfinite()
    assert finite[:, 1].all()
    assert (~finite[:, 0]).nonzero().flatten().tolist() == [13, 14, 15]
    _, scales = rtn.round_matrix(torch.full((32, 128), 1e6, dtype=torch.bfloat16))
    assert scales.isinf().all()  # 1e6 / 8 is more than FP16 has


def test_pieces_join(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rtn.round_matrix(hard(), int4.EAGER)
    monkeypatch.setattr(int4, "PIECE_CODES", 5 * 256)
    for found, expected in zip(rtn.round_matrix(hard(), int4.EAGER), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "expected"), [("normal", 0.01063), ("laplace", 0.01987)])
def test_error_on_known_distributions(kind: str, expected: float) -> None:
    weight = sample(kind, 3000, seed=1)
    assert math.isclose(relative_mse(weight, *rtn.round_matrix(weight)), expected, rel_tol=0.01)
