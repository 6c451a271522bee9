"""The chunked rule against its definition: the recurrence, one token at a time, in float64.

transformers' own rule is the yardstick for how much rounding float32 costs; flash-linear-attention's kernel is compared where
there is a GPU.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from mtpress.models import gated_delta_rule
from mtpress.models.gated_delta_rule import chunk_gated_delta_rule

Inputs = dict[str, Tensor]


def inputs(
    num_tokens: int, decay: str, heads: tuple[int, int] = (2, 6), dims: tuple[int, int] = (64, 32), batch: int = 1, seed=0
) -> Inputs:
    """As a layer of the model makes them: queries, keys, values are one BF16 matrix with the token innermost (after the convolution).

    decay: "near 1" keeps 99 % and more a token, "strong" down to e^-20, "mixed" has all of that, one head each, like the model.
    """
    random = torch.Generator().manual_seed(seed)
    (num_keys, num_values), (key_dim, value_dim) = heads, dims
    widths = [num_keys * key_dim, num_keys * key_dim, num_values * value_dim]
    mixed = torch.randn(batch, sum(widths), num_tokens, generator=random)
    # keys of neighbouring tokens are alike, which is what the triangular inverse finds hard
    mixed = torch.nn.functional.silu(mixed + torch.randn(batch, sum(widths), 1, generator=random)).bfloat16().transpose(1, 2)
    query, key, value = (x.unflatten(2, (n, -1)) for x, n in zip(mixed.split(widths, 2), (num_keys, num_keys, num_values), strict=True))
    low, high = {"near 1": (-5.0, -2.0), "strong": (0.0, 1.3), "mixed": (-5.0, 1.3)}[decay]
    g = -torch.rand(batch, num_tokens, num_values, generator=random) * torch.logspace(low, high, num_values)
    beta = torch.randn(batch, num_tokens, num_values, generator=random).mul(2).bfloat16().sigmoid()
    return {"query": query, "key": key, "value": value, "g": g, "beta": beta}


def recurrence(x: Inputs, state: Tensor | None = None, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """float64 reads [B, T, Hv, Dv] and final state [B, Hv, Dk, Dv], straight from the definition."""
    query, key, value, g, beta = (x[name].double() for name in ("query", "key", "value", "g", "beta"))
    if normalize:
        query, key = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (query, key))
    group = value.shape[2] // key.shape[2]
    query, key = (y.repeat_interleave(group, 2) for y in (query, key))
    batch, num_tokens, heads, dim = key.shape
    state = key.new_zeros(batch, heads, dim, value.shape[3]) if state is None else state.double()
    reads = torch.empty_like(value)
    for t in range(num_tokens):
        state = state * g[:, t, :, None, None].exp()
        wrong = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t] * beta[:, t, :, None], wrong)
        reads[:, t] = torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * dim**-0.5
    return reads, state


def in_float32(x: Inputs) -> Inputs:
    """The same numbers, so that what a rule returns is not rounded to BF16."""
    return {name: y.float() for name, y in x.items()}


def transformers_rule(x: Inputs, **options: object) -> tuple[Tensor, Tensor | None]:
    group = x["value"].shape[2] // x["key"].shape[2]
    repeated = {name: x[name].repeat_interleave(group, 2) for name in ("query", "key")}
    return torch_chunk_gated_delta_rule(**{**x, **repeated}, **options)  # type: ignore[no-any-return]


def error(x: Tensor, exact: Tensor) -> float:
    """Root mean square, of the exact one's."""
    return float((x.double() - exact).norm() / exact.norm())


def bf16_steps(x: Tensor, y: Tensor) -> Tensor:
    """How many BF16 numbers apart."""
    x, y = (z.view(torch.int16).int() for z in (x, y))
    x, y = (torch.where(z < 0, -(z & 0x7FFF), z) for z in (x, y))
    return (x - y).abs()


CASES = [(t, d) for d in ("near 1", "strong", "mixed") for t in (1, 10, 64, 150, 530)]


@pytest.mark.parametrize(("num_tokens", "decay"), CASES)
@pytest.mark.parametrize("given_state", [False, True])
def test_reads_and_final_state_are_the_recurrence(num_tokens: int, decay: str, given_state: bool) -> None:
    x = inputs(num_tokens, decay)
    state = torch.randn(1, 6, 64, 32, generator=torch.Generator().manual_seed(1)) if given_state else None
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    exact, exact_state = recurrence(x, state)
    reads, final = chunk_gated_delta_rule(**in_float32(x), **options)
    reads_theirs, final_theirs = transformers_rule(in_float32(x), **options)
    eps = torch.finfo(torch.float32).eps
    for ours, theirs, true in ((reads, reads_theirs, exact), (final, final_theirs, exact_state)):
        assert ours.dtype == torch.float32 and ours.shape == true.shape and ours.is_contiguous()
        assert error(ours, true) < 16 * eps
        assert error(ours, true) < 2 * error(theirs, true) + eps
        assert float((ours - true).abs().max()) < 64 * eps * float(true.abs().max())

    rounded, _ = chunk_gated_delta_rule(**x, **options)
    assert rounded.dtype == torch.bfloat16
    steps = bf16_steps(rounded, exact.bfloat16())
    # only where float64's value lies next to the middle of two BF16 numbers, as far as the float32 error reaches
    reach = 64 * eps * float(exact.abs().max())
    beside = (exact - reach).bfloat16() != (exact + reach).bfloat16()
    assert not bool((steps != 0).logical_and(~beside).any())
    large = exact.abs() > 2**-8 * exact.abs().max()  # below, one float32 error spans several of the ever finer BF16 numbers
    assert int(steps[large].max()) <= 1
    assert float((steps != 0).float().mean()) < 0.002 + 2 / steps.numel()


def test_the_full_width_of_the_model() -> None:
    """16 key heads, 48 value heads, dimensions of 128."""
    x = inputs(200, "mixed", heads=(16, 48), dims=(128, 128))
    exact, exact_state = recurrence(x)
    reads, final = chunk_gated_delta_rule(**x, output_final_state=True, use_qk_l2norm_in_kernel=True)
    assert float((bf16_steps(reads, exact.bfloat16()) != 0).float().mean()) < 0.002
    assert final is not None and error(final, exact_state) < 16 * torch.finfo(torch.float32).eps


def test_all_tokens_alike_is_the_hardest_inverse() -> None:
    """One key, full writes, no decay: powers of the triangular matrix reach 1e8 within a chunk of 32 and 1e18 within 64."""
    x = in_float32(inputs(256, "near 1"))
    x["key"] = x["key"][:, :1].expand_as(x["key"]).contiguous()
    x["beta"], x["g"] = torch.ones_like(x["beta"]), torch.zeros_like(x["g"])
    exact, _ = recurrence(x)
    for chunk_size in (32, 64, 128):
        reads, _ = chunk_gated_delta_rule(**x, chunk_size=chunk_size, use_qk_l2norm_in_kernel=True)
        assert error(reads, exact) < 64 * torch.finfo(torch.float32).eps


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 300),
    heads=st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 6)]),
    dims=st.tuples(st.sampled_from([8, 16, 48]), st.sampled_from([8, 24])),
    batch=st.integers(1, 2),
    chunk_size=st.sampled_from([16, 32, 64, 128]),
    normalize=st.booleans(),
    decay=st.sampled_from(["near 1", "strong", "mixed"]),
)
def test_any_shape(num_tokens: int, heads, dims, batch: int, chunk_size: int, normalize: bool, decay: str) -> None:
    x = in_float32(inputs(num_tokens, decay, heads, dims, batch, seed=num_tokens))
    if not normalize:  # keys no longer than 1, or the recurrence itself grows without bound
        x["key"] = x["key"] / x["key"].norm(dim=-1, keepdim=True).clamp_min(1e-3)
    exact, exact_state = recurrence(x, normalize=normalize)
    options = {"chunk_size": chunk_size, "output_final_state": True, "use_qk_l2norm_in_kernel": normalize}
    reads, final = chunk_gated_delta_rule(**x, **options)
    assert final is not None
    assert error(reads, exact) < 1e-5 and error(final, exact_state) < 1e-5


def test_memory_layout_of_the_inputs_and_repeated_keys_change_nothing() -> None:
    x = inputs(100, "mixed")
    expected, _ = chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)
    contiguous = {name: y.contiguous() for name, y in x.items()}
    assert torch.equal(chunk_gated_delta_rule(**contiguous, use_qk_l2norm_in_kernel=True)[0], expected)
    repeated = {name: x[name].repeat_interleave(3, 2) for name in ("query", "key")}
    reads, _ = chunk_gated_delta_rule(**{**x, **repeated}, use_qk_l2norm_in_kernel=True)
    assert float((bf16_steps(reads, expected) != 0).float().mean()) < 0.002


def test_a_sequence_in_two_calls_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one call leaves as final state, the next takes; and segments are nothing but such calls."""
    x = inputs(300, "near 1")
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    whole, final = chunk_gated_delta_rule(**x, **options)
    first, state = chunk_gated_delta_rule(**{n: y[:, :128] for n, y in x.items()}, **options)
    kept = state.clone() if state is not None else None
    second, last = chunk_gated_delta_rule(**{n: y[:, 128:] for n, y in x.items()}, initial_state=state, **options)
    assert final is not None and last is not None and state is not None and kept is not None
    assert torch.equal(state, kept), "the caller's state was written to"
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(last, final)
    monkeypatch.setattr(gated_delta_rule, "SEGMENT", 64)
    assert torch.equal(chunk_gated_delta_rule(**x, **options)[0], whole)


def test_the_number_of_threads_changes_no_bit() -> None:
    x = inputs(200, "mixed", heads=(4, 12), dims=(128, 128))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(chunk_gated_delta_rule(**x, output_final_state=True, use_qk_l2norm_in_kernel=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_final_state_unless_asked() -> None:
    assert chunk_gated_delta_rule(**inputs(5, "mixed"))[1] is None


def test_what_is_not_supported_says_so() -> None:
    x = inputs(20, "mixed")
    with pytest.raises(ValueError, match=r"does not support cu_seqlens$"):
        chunk_gated_delta_rule(**x, cu_seqlens=torch.tensor([0, 8, 20]))
    with pytest.raises(ValueError, match=r"does not support head_first$"):
        chunk_gated_delta_rule(**x, head_first=True)
    chunk_gated_delta_rule(**x, cu_seqlens=None, head_first=None)  # as transformers passes what it does not use
    for chunk_size in (0, 8, 48):
        with pytest.raises(ValueError, match="chunk_size"):
            chunk_gated_delta_rule(**x, chunk_size=chunk_size)
    for name, wrong in itertools.product(("query", "value", "g", "beta"), (slice(0, 19), slice(0, 0))):
        with pytest.raises(ValueError, match=r"fit together|must be"):
            chunk_gated_delta_rule(**{**x, name: x[name][:, wrong]})
    with pytest.raises(ValueError, match="initial_state"):
        chunk_gated_delta_rule(**x, initial_state=torch.zeros(1, 2, 64, 32))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash-linear-attention's kernel runs on a GPU")
@pytest.mark.parametrize("num_tokens", [10, 64, 1000])
def test_flash_linear_attention_agrees(num_tokens: int) -> None:
    """Its products take TF32 or BF16 operands, hence the wider bound; both are held against float64."""
    fla = pytest.importorskip("fla.ops.gated_delta_rule")
    x = inputs(num_tokens, "mixed", heads=(16, 48), dims=(128, 128))
    exact, exact_state = recurrence(x)
    on_gpu = {name: y.cuda() for name, y in x.items()}
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    reads, final = chunk_gated_delta_rule(**on_gpu, **options)
    repeated = {name: on_gpu[name].repeat_interleave(3, 2).contiguous() for name in ("query", "key")}
    contiguous = {name: y.contiguous() for name, y in on_gpu.items()}
    reads_fla, final_fla = fla.chunk_gated_delta_rule(**{**contiguous, **repeated}, **options)
    assert final is not None
    assert error(reads.cpu(), exact) < 2**-8 and error(final.cpu(), exact_state) < 1e-5
    assert error(reads_fla.cpu(), exact) < 0.02 and error(final_fla.cpu(), exact_state) < 0.02
    assert error(reads.cpu(), reads_fla.cpu().double()) < 0.02 and error(final.cpu(), final_fla.cpu().double()) < 0.02
