"""The rule's gradients against autograd through its definition: the recurrence, one token at a time, in float64."""

import pytest
import torch
from test_gated_delta_rule import Inputs, inputs, recurrence

from mtpress.models import gated_delta_rule_gradient as gradient
from mtpress.models.gated_delta_rule import chunk_gated_delta_rule
from mtpress.models.gated_delta_rule_gradient import differentiable_rule, segment_reads

NAMES = ("query", "key", "value", "g", "beta")


def leaves(x: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return {name: y.detach().to(dtype or y.dtype).clone().requires_grad_() for name, y in x.items()}


def true_gradients(x: Inputs, weights: torch.Tensor) -> list[torch.Tensor]:
    exact = leaves(x, torch.float64)
    # the reads of a step must not be overwritten where autograd looks back at them
    reads, _ = recurrence(exact)
    return list(torch.autograd.grad((reads * weights.double()).sum(), [exact[name] for name in NAMES]))


@pytest.mark.parametrize(("num_tokens", "batch", "segment"), [(37, 1, 512), (96, 3, 32), (70, 2, 512), (5, 2, 512)])
@pytest.mark.parametrize("decay", ["near 1", "mixed"])
def test_gradients_are_those_of_the_recurrence(num_tokens, batch, segment, decay, monkeypatch):
    monkeypatch.setattr(gradient, "SEGMENT", segment)
    x = {name: y.float() for name, y in inputs(num_tokens, decay, batch=batch, dims=(32, 16)).items()}
    weights = torch.randn(x["value"].shape, generator=torch.Generator().manual_seed(1))
    found = leaves(x)
    reads, final = differentiable_rule(**found, use_qk_l2norm_in_kernel=True)
    assert final is None
    made = torch.autograd.grad((reads * weights).sum(), [found[name] for name in NAMES])
    for name, ours, exact in zip(NAMES, made, true_gradients(x, weights), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 2e-5 * exact.norm(), name


def test_the_reads_are_the_bits_of_the_rule_without_gradients():
    x = inputs(1100, "mixed")
    plain, _ = chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)
    assert torch.equal(differentiable_rule(**leaves(x), use_qk_l2norm_in_kernel=True)[0], plain)


def test_a_segment_in_float64_is_the_recurrence():
    x = inputs(50, "mixed", batch=2)
    state = torch.randn(2, 6, 64, 32, dtype=torch.float64)
    exact, exact_final = recurrence(x, state)
    parts = tuple(x[name].double() for name in NAMES)
    reads, final = segment_reads(parts, state, normalize=True)
    assert torch.allclose(reads, exact, rtol=1e-9, atol=1e-11)
    assert torch.allclose(final, exact_final, rtol=1e-9, atol=1e-11)


def test_states_are_refused():
    with pytest.raises(ValueError, match="whole sequences"):
        differentiable_rule(**inputs(20, "mixed"), output_final_state=True)
    with pytest.raises(ValueError, match="cu_seqlens"):
        differentiable_rule(**inputs(20, "mixed"), cu_seqlens=torch.tensor([0, 20]))
