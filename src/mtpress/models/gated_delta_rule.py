"""The gated delta rule over a whole sequence, chunk by chunk, from plain PyTorch matrix products.

In: queries, keys, values, log decays and write strengths of every token. Out: what each token reads, and the final state.
Leaves out: several sequences packed into one (cu_seqlens), one token at a time from a cache, gradients.

transformers has the same rule as a readable reference and takes a CUDA kernel for speed (flash-linear-attention); this one
is for where that kernel cannot run. Arithmetic is float32 throughout.
"""

import torch
from torch import Tensor

CHUNK_SIZE = 32  # fewest operations; 64 and 128 were measured slower on CPU (benchmarks/bench_gated_delta_rule.py)
SEGMENT = 512  # tokens worked on at once: their float32 copies then stay in the last cache, and memory does not grow with T
BASE = 16  # triangular blocks up to this size are inverted row by row, larger ones by products


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = CHUNK_SIZE,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **unsupported: object,
) -> tuple[Tensor, Tensor | None]:
    """Reads of the recurrence S_t = exp(g_t) S_(t-1) + beta_t k_t (v_t - exp(g_t) S_(t-1)^T k_t)^T, o_t = S_t^T q_t / sqrt(Dk).

    query, key [B, T, Hk, Dk] and value [B, T, Hv, Dv] of one dtype, Hv a multiple of Hk: value head h has key head h // (Hv/Hk),
    whether the caller repeated keys or not. g, beta [B, T, Hv]: log decay (at most 0) and write strength. initial_state
    [B, Hv, Dk, Dv]. chunk_size: 16 times a power of two. With use_qk_l2norm_in_kernel queries and keys are normalized here.
    Returns o [B, T, Hv, Dv] in query's dtype and, where asked for, S_T in float32 [B, Hv, Dk, Dv].
    Raises ValueError for packed sequences, unknown options and shapes that do not fit together.

    Formula: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024, sections 2.2 and 3.3 (chunks, WY representation). Within a
    chunk that starts from S, with G = the running sum of g, U = (I + L)^-1 diag(beta) (V - exp(G) K S), L_ij = beta_i exp(G_i -
    G_j) k_i.k_j for j < i, the reads are exp(G) Q S + P U, P_ij = exp(G_i - G_j) q_i.k_j for j <= i, and the next state is
    exp(G_C) S + (exp(G_C - G) K)^T U. The paper multiplies (I + L)^-1 into K beforehand; here it meets the difference, once.
    """
    if cu_seqlens is not None or any(option is not None for option in unsupported.values()):
        names = ["cu_seqlens"] * (cu_seqlens is not None) + [name for name, option in unsupported.items() if option is not None]
        raise ValueError(f"the gated delta rule of mtpress does not support {', '.join(names)}")
    batch, num_tokens, num_keys, key_dim = key.shape
    num_values, value_dim = value.shape[2:]
    _check_shapes(query, key, value, g, beta, initial_state, chunk_size)
    group = num_values // num_keys
    chunk = min(chunk_size, max(BASE, 1 << (num_tokens - 1).bit_length()))  # a short sample is one small chunk

    # The state lies transposed, [keys, values a key, Dv, Dk]: one product then serves all values of a key.
    state = value.new_zeros((batch * num_keys, group, value_dim, key_dim), dtype=torch.float32)
    if initial_state is not None:
        state.copy_(initial_state.reshape(batch * num_keys, group, key_dim, value_dim).mT)
    out = query.new_empty((batch, num_tokens, num_values, value_dim))
    step = max(SEGMENT, chunk)
    for start in range(0, num_tokens, step):
        now = slice(start, start + step)
        parts = (query[:, now], key[:, now], value[:, now], g[:, now], beta[:, now])
        _segment(*parts, state, out[:, now], chunk, use_qk_l2norm_in_kernel)
    final = state.mT.reshape(batch, num_values, key_dim, value_dim).contiguous() if output_final_state else None
    return out, final


def _check_shapes(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, chunk_size: int
) -> None:
    batch, num_tokens, num_keys, key_dim = key.shape
    num_values, value_dim = value.shape[2:]
    if chunk_size < BASE or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size {chunk_size} is not {BASE} times a power of two")
    if num_tokens == 0 or query.shape != key.shape or num_values % num_keys or value.shape[:2] != key.shape[:2]:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit together")
    if not g.shape == beta.shape == (batch, num_tokens, num_values):
        raise ValueError(f"g {list(g.shape)} and beta {list(beta.shape)} must be {[batch, num_tokens, num_values]}")
    if initial_state is not None and initial_state.shape != (batch, num_values, key_dim, value_dim):
        raise ValueError(f"initial_state {list(initial_state.shape)} must be {[batch, num_values, key_dim, value_dim]}")


def _segment(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, state: Tensor, out: Tensor, chunk: int, normalize: bool
) -> None:
    """Moves `state` [keys, group, Dv, Dk] over some chunks, in place, and writes their reads to `out` [B, T, Hv, Dv]."""
    keys, group, value_dim, key_dim = state.shape
    q_nkdc, k_nkdc = (_chunks(x, chunk) for x in (query, key))
    if normalize:
        k_nkdc.mul_(_inverse_norm(k_nkdc))
        q_nkdc.mul_(_inverse_norm(q_nkdc).mul_(key_dim**-0.5))
    else:
        q_nkdc.mul_(key_dim**-0.5)
    beta_nkc, g_nkc = (_chunks(x.unsqueeze(3), chunk).view(-1, keys, group, chunk) for x in (beta, g))
    g_nkc = g_nkc.cumsum(-1)
    decay = g_nkc.exp()
    to_end = (g_nkc[..., -1:] - g_nkc).exp_()
    solve, attention = _within_chunks(q_nkdc, k_nkdc, g_nkc, beta_nkc)

    num_chunks = k_nkdc.shape[0]
    v, seen, wrote = (state.new_empty((keys, group, value_dim, chunk)) for _ in range(3))
    reads = state.new_empty((group, keys, chunk, value_dim))
    seen_joint, wrote_joint, state_joint = (x.flatten(1, 2) for x in (seen, wrote, state))
    for n in range(num_chunks):
        now = slice(n * chunk, (n + 1) * chunk)
        _fill(v, value[:, now])
        torch.bmm(state_joint, k_nkdc[n], out=seen_joint)
        torch.addcmul(v, seen, decay[n].unsqueeze(2), value=-1, out=seen)
        torch.bmm(seen.flatten(0, 1), solve[n].flatten(0, 1).mT, out=wrote.flatten(0, 1))
        for i in range(group):
            torch.bmm(q_nkdc[n].mT, state[:, i].mT, out=reads[i])
            reads[i].mul_(decay[n, :, i].unsqueeze(2)).baddbmm_(attention[n, :, i], wrote[:, i].mT)
        _store(out[:, now], reads)
        wrote.mul_(to_end[n].unsqueeze(2))
        state.mul_(decay[n, :, :, -1:, None])
        state_joint.baddbmm_(wrote_joint, k_nkdc[n].mT)


def _fill(v: Tensor, value: Tensor) -> None:
    """value [B, up to C, Hv, Dv] → v [B * Hk, group, Dv, C], zeros after the last token."""
    into = v.view(value.shape[0], -1, *v.shape[2:]).permute(0, 3, 1, 2)
    into[:, : value.shape[1]].copy_(value)
    into[:, value.shape[1] :].zero_()


def _store(out: Tensor, reads: Tensor) -> None:
    """reads [group, B * Hk, C, Dv] → out [B, up to C, Hv, Dv]."""
    group, _, chunk, value_dim = reads.shape
    tokens = reads.view(group, out.shape[0], -1, chunk, value_dim).permute(1, 3, 2, 0, 4)
    out.view(*out.shape[:2], -1, group, value_dim).copy_(tokens[:, : out.shape[1]])


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, D] → float32 [chunks, B * H, D, C]; tokens beyond T are zeros, which neither decay nor write."""
    batch, num_tokens, heads, dim = x.shape
    num_chunks = -(-num_tokens // chunk)
    whole = num_tokens // chunk
    y = x.new_empty((num_chunks, batch, heads, dim, chunk), dtype=torch.float32)
    if whole:
        y[:whole].copy_(x[:, : whole * chunk].view(batch, whole, chunk, heads, dim).permute(1, 0, 3, 4, 2))
    if whole < num_chunks:
        rest = num_tokens - whole * chunk
        y[whole, ..., :rest].copy_(x[:, whole * chunk :].permute(0, 2, 3, 1))
        y[whole, ..., rest:].zero_()
    return y.view(num_chunks, batch * heads, dim, chunk)


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / sqrt(sum of squares + 1e-6) over the dimension before the last; the constant is flash-linear-attention's."""
    return x.square().sum(-2, keepdim=True).add_(1e-6).rsqrt_()


def _within_chunks(q_nkdc: Tensor, k_nkdc: Tensor, g_nkc: Tensor, beta_nkc: Tensor) -> tuple[Tensor, Tensor]:
    """(I + L)^-1 diag(beta) and P of every chunk and value head, [chunks, keys, group, C, C] each."""
    chunk = k_nkdc.shape[-1]
    pairs = k_nkdc.flatten(0, 1)
    k_dot_k = torch.bmm(pairs.mT, pairs).view(*k_nkdc.shape[:2], 1, chunk, chunk)
    q_dot_k = torch.bmm(q_nkdc.flatten(0, 1).mT, pairs).view_as(k_dot_k)
    # Above the diagonal the exponent is positive and may overflow: cut off after exp, before anything multiplies it.
    attention = (g_nkc.unsqueeze(-1) - g_nkc.unsqueeze(-2)).exp_().tril_()
    lower = k_dot_k * attention
    lower.mul_(beta_nkc.unsqueeze(-1)).tril_(-1)
    attention.mul_(q_dot_k)
    solve = _unit_lower_inverse(lower.view(-1, chunk, chunk)).view_as(lower)
    return solve.mul_(beta_nkc.unsqueeze(-2)), attention


def _unit_lower_inverse(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for strictly lower triangular [N, C, C].

    Diagonal blocks of 16 by forward substitution, for all N at once; then blocks are joined two by two,
    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]. Powers of `lower` (Neumann doubling) would need fewer steps, but
    for like keys they grow as binomial coefficients and cancel.
    """
    size = lower.shape[-1]
    num_blocks = size // BASE
    split = (-1, num_blocks, BASE, num_blocks, BASE)
    # The N matrices go last: every row step is then a few operations on long contiguous vectors.
    rows = lower.view(split).diagonal(dim1=1, dim2=3).permute(1, 2, 3, 0).neg().contiguous()  # [16, 16, blocks, N]
    for i in range(2, BASE):
        rows[i, :i] += (rows[i, :i].unsqueeze(1) * rows[:i, :i]).sum(0)
    rows.diagonal(dim1=0, dim2=1).fill_(1)
    inverse = torch.zeros_like(lower)
    inverse.view(split).diagonal(dim1=1, dim2=3).copy_(rows.permute(3, 0, 1, 2))
    half = BASE
    while half < size:
        for start in range(0, size, 2 * half):
            first, second = slice(start, start + half), slice(start + half, start + 2 * half)
            joined = torch.bmm(inverse[:, second, second], lower[:, second, first])
            inverse[:, second, first] = torch.bmm(joined, inverse[:, first, first]).neg_()
        half *= 2
    return inverse
