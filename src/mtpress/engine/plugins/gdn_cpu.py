"""A vLLM plugin: Gated DeltaNet on vLLM's CPU platform, for prompts of one token and for rows with fewer drafts than others.

Two faults of vLLM 0.32. On CPUs with AVX-512 BF16 (AMX, where drafts are configured) its convolution refuses a tensor [channels, 1]
unless the strides are those of a transposed one, which a tensor with one column need not have: the engine dies at the first prompt of
one token. And it keeps the convolution's history at the end of a buffer, where the next step looks for it only if the row held all
the drafts there may be: behind a row that a grammar, a token budget or the end of the context cut short, tokens are computed from a
shifted history, or the shapes do not fit and the engine dies. Both are mended around vLLM's functions: strides are set, and short rows
are filled up with tokens whose outputs are dropped. Leaves out: other platforms. Harmless for a later vLLM: vLLM 0.33 mends the second
fault, and a full row is right there too.

vLLM calls `register` in each process it starts, possibly more than once.
"""

import logging
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm.plugins.mtpress_gdn_cpu")


def register() -> None:
    """Wraps the two functions, on the CPU only."""
    try:
        from vllm.platforms import PlatformEnum, current_platform

        if current_platform._enum != PlatformEnum.CPU:
            return
        from vllm import _custom_ops
        from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

        convolve, speculate = _custom_ops.causal_conv1d_fwd_cpu, gdn_attention._spec_forward
    except (ImportError, AttributeError) as error:
        logger.debug("this vLLM computes Gated DeltaNet in another way: %s", error)
        return
    if not hasattr(speculate, "__wrapped__"):
        _custom_ops.causal_conv1d_fwd_cpu = transposed(convolve)
        gdn_attention._spec_forward = in_full_rows(speculate)


def transposed(convolve: Any) -> Any:
    """vLLM's causal_conv1d_fwd_cpu, which asks for x [channels, tokens] with strides (1, channels)."""

    @wraps(convolve)
    def convolved(x: "torch.Tensor", *others: Any, **named: Any) -> Any:
        import torch

        if x.dim() == 2 and x.stride() != (1, x.shape[0]):  # contiguous() takes any stride for a dimension of one, clone sets it anew
            x = x.t().clone(memory_format=torch.contiguous_format).t()
        return convolve(x, *others, **named)

    return convolved


def in_full_rows(speculate: Any) -> Any:
    """vLLM's _spec_forward: the rows of drafting requests, stacked [tokens, channels], to their outputs in the same order."""

    @wraps(speculate)
    def spoken(layer: Any, metadata: Any, mixed_qkv: "torch.Tensor", b: "torch.Tensor", a: "torch.Tensor", *cache: Any) -> Any:
        import torch

        _, _, width, state_len = cache  # of the convolution's history; before it the buffers of both states
        full = state_len - (width - 2)  # a token and its drafts
        starts = metadata.spec_query_start_loc[: metadata.num_spec_decodes + 1]
        lengths = starts.diff().tolist()
        if all(length in (0, full) for length in lengths):
            return speculate(layer, metadata, mixed_qkv, b, a, *cache)
        filled = torch.tensor([full if length else 0 for length in lengths], dtype=starts.dtype)
        ends = filled.cumsum(0, dtype=starts.dtype)
        kept = torch.cat([torch.arange(length) + int(end) - full for length, end in zip(lengths, ends, strict=True) if length])

        def fill(rows: "torch.Tensor") -> "torch.Tensor":
            return rows.new_zeros(int(ends[-1]), *rows.shape[1:]).index_copy(0, kept, rows)

        metadata = replace(metadata, spec_query_start_loc=torch.cat([ends.new_zeros(1), ends]))
        return speculate(layer, metadata, fill(mixed_qkv), fill(b), fill(a), *cache)[kept]

    return spoken
