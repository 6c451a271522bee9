"""The gated delta rule with a backward: what gated_delta_rule.py computes, for tuning weights in front of it.

In: what the chunked rule takes. Out: the same reads, from the same code, with gradients of queries, keys, values, log decays
and write strengths. Leaves out: gradients of an initial state, and of the final state, which training on whole sequences does
not need.

The forward keeps its inputs and the state at every segment; the backward goes through the segments from the last to the first,
computes each once more in operations that autograd follows, and never holds the intermediate results of more than one.
"""

from typing import Any

import torch
from torch import Tensor

from mtpress.models.gated_delta_rule import CHUNK_SIZE, SEGMENT, _unit_lower_inverse, chunk_gated_delta_rule

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # query, key, value, g, beta


def differentiable_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **options: object,
) -> tuple[Tensor, Tensor | None]:
    """chunk_gated_delta_rule of a whole sequence with gradients; shapes, dtypes and errors are its."""
    if initial_state is not None or output_final_state:
        raise ValueError("the rule with gradients takes whole sequences: no initial_state, no output_final_state")
    if any(option is not None for option in options.values()):
        chunk_gated_delta_rule(query, key, value, g, beta, **options)  # type: ignore[arg-type]  # raises with the names
    return _Rule.apply(query, key, value, g, beta, use_qk_l2norm_in_kernel), None  # type: ignore[no-untyped-call]


class _Rule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, normalize: bool) -> Tensor:
        parts = (query, key, value, g, beta)
        state: Tensor | None = None
        reads, starts = [], []
        for start in range(0, key.shape[1], SEGMENT):
            q, k, v, g, beta = (x[:, start : start + SEGMENT] for x in parts)
            starts.append(state)
            out, state = chunk_gated_delta_rule(
                q, k, v, g, beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=normalize
            )
            reads.append(out)
        ctx.save_for_backward(*parts)
        ctx.starts, ctx.normalize = starts, normalize
        return torch.cat(reads, 1) if len(reads) > 1 else reads[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        parts: Parts = ctx.saved_tensors
        (grad,) = grads
        batch, num_tokens = grad.shape[:2]
        found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in parts]
        samples = max(1, SEGMENT // num_tokens)  # short samples go together
        for first in range(0, batch, samples):
            some = slice(first, first + samples)
            grad_state = None
            for i in reversed(range(len(ctx.starts))):
                now = slice(i * SEGMENT, (i + 1) * SEGMENT)
                start = None if ctx.starts[i] is None else ctx.starts[i][some]
                pieces: Any = tuple(x[some, now].detach() for x in parts)
                made, grad_state = _segment_gradients(pieces, start, grad[some, now], grad_state, ctx.normalize)
                for into, piece in zip(found, made, strict=True):
                    into[some, now].copy_(piece)
        return *found, None


def _segment_gradients(
    parts: Parts, start: Tensor | None, grad: Tensor, grad_state: Tensor | None, normalize: bool
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Gradients of a segment's query, key, value, g, beta, and of the state in front of it (None where that is none)."""
    inputs = [x.requires_grad_() for x in (*parts, *(() if start is None else (start.detach(),)))]
    with torch.enable_grad():
        out, final = segment_reads(parts, None if start is None else inputs[5], normalize)
    outputs, grads = [out], [grad.to(out.dtype)]
    if grad_state is not None:
        outputs, grads = [out, final], [*grads, grad_state]
    made = torch.autograd.grad(outputs, inputs, grads)
    return made[:5], None if start is None else made[5]


def segment_reads(parts: Parts, state: Tensor | None, normalize: bool, chunk: int = CHUNK_SIZE) -> tuple[Tensor, Tensor]:
    """Reads [B, T, Hv, Dv] and the state [B, Hv, Dk, Dv] behind them, by the formula of chunk_gated_delta_rule, out of place.

    Computed and returned in float32, or in float64 where the queries are; `chunk` is at least 16 and a power of two.
    """
    query, key, value, g, beta = parts
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, num_tokens, num_keys, key_dim = key.shape
    num_values, value_dim = value.shape[2:]
    group, num_chunks = num_values // num_keys, -(-num_tokens // chunk)

    def chunks(x: Tensor) -> Tensor:
        """[B, T, H, ...] → [chunks, B * H, C, ...]; tokens beyond T are zeros, which neither decay nor write."""
        x = x.to(dtype)
        if num_chunks * chunk > num_tokens:
            x = torch.cat([x, x.new_zeros(batch, num_chunks * chunk - num_tokens, *x.shape[2:])], 1)
        return x.reshape(batch, num_chunks, chunk, *x.shape[2:]).movedim(1, 0).movedim(3, 2).flatten(1, 2)

    q, k, v, g, beta = chunks(query), chunks(key), chunks(value), chunks(g), chunks(beta)
    if normalize:
        q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    # from here [chunks, B * Hk, values a key, C, ...]; what belongs to a key has 1 there
    q, k = (q * key_dim**-0.5).unsqueeze(2), k.unsqueeze(2)
    v, g, beta = (x.reshape(num_chunks, batch * num_keys, group, *x.shape[2:]) for x in (v, g.cumsum(-1), beta))
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).triu(1)
    ratio = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()
    k_dot_k = k @ k.mT
    lower = (k_dot_k * ratio * beta.unsqueeze(-1)).tril(-1)
    solve = _UnitLowerInverse.apply(lower) * beta.unsqueeze(-2)  # type: ignore[no-untyped-call]
    attention = (q @ k.mT) * ratio
    decay = g.exp().unsqueeze(-1)
    wrote_if_empty, seen = solve @ v, solve @ (k * decay)
    to_end = k * (g[..., -1:] - g).exp().unsqueeze(-1)
    carried = decay[..., -1:, :]

    shape = (batch * num_keys, group, key_dim, value_dim)
    now = k.new_zeros(shape) if state is None else state.reshape(shape)
    before, wrote = [], []
    for n in range(num_chunks):
        before.append(now)
        wrote.append(wrote_if_empty[n] - seen[n] @ now)
        now = now * carried[n] + to_end[n].mT @ wrote[n]
    reads = (q * decay) @ torch.stack(before) + attention @ torch.stack(wrote)
    reads = reads.view(num_chunks, batch, num_values, chunk, value_dim).permute(1, 0, 3, 2, 4).flatten(1, 2)
    return reads[:, :num_tokens], now.view(batch, num_values, key_dim, value_dim)


class _UnitLowerInverse(torch.autograd.Function):
    """(I + L)^-1 of strictly lower triangular L [..., C, C]; its gradient is -A^T dA A^T below the diagonal."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        inverse = _unit_lower_inverse(lower.reshape(-1, *lower.shape[-2:])).view(lower.shape)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grads[0] @ inverse.mT).neg_().tril_(-1)
