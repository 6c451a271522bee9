"""Runs under the engine's python: Gated DeltaNet's drafting path of vLLM's CPU build on rows that are not all full.

    gdn_on_cpu.py {stock|mended} FOUND.json

One layer's tokens go through twice: in steps whose rows hold all the drafts there may be, of which one token is accepted each time, which
every version computes right; and in steps that hold fewer, of which some are accepted. What is rejected is noise. Out: for "short" (two
requests, rows of several lengths) and "cut" (fewer tokens than were accepted before) the largest relative difference of the outputs
between the two ways, or the error; "native" says the same for the convolution of [channels, 1], by a stand-in for the native kernel
that checks strides as it does.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.platforms import current_platform
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadata

current_platform.import_kernels()
WIDTH, DRAFTS, HEADS, DIM = 4, 3, 2, 64
CHANNELS, STATE = 3 * HEADS * DIM, WIDTH - 1 + DRAFTS
NUM_TOKENS = 24
# (tokens in the row of each request, how many of them are accepted)
SHORT = [((4, 4), (2, 1)), ((2, 4), (1, 3)), ((3, 3), (2, 1)), ((2, 4), (2, 1)), ((4, 1), (1, 1)), ((4, 4), (1, 2))]
CUT = [((4,), (4,)), ((1,), (1,)), ((4,), (2,)), ((2,), (2,)), ((4,), (1,))]


def layer(random):
    weight = torch.randn(CHANNELS, 1, WIDTH, generator=random).bfloat16()

    def rearranged(mixed):
        return tuple(part.reshape(1, -1, HEADS, DIM).contiguous() for part in mixed.chunk(3, dim=-1))

    return SimpleNamespace(
        conv1d=SimpleNamespace(weight=weight, bias=None), activation="silu", rearrange_mixed_qkv=rearranged,
        A_log=torch.rand(HEADS, generator=random), dt_bias=torch.rand(HEADS, generator=random).bfloat16(),
    )  # fmt: skip


def ran(made, streams, steps):
    """The outputs of each request's accepted tokens. streams: (mixed, b, a), each [requests, tokens, …]."""
    count = len(steps[0][0])
    conv = torch.zeros(count + 1, STATE, CHANNELS, dtype=torch.bfloat16).transpose(1, 2)
    ssm = torch.zeros(count * (DRAFTS + 1) + 1, HEADS, DIM, DIM)
    slots = torch.arange(count * (DRAFTS + 1), dtype=torch.int32).view(count, -1) + 1
    slots[:, 0] = torch.arange(count) + 1  # the first column names the slot of the convolution too
    slots[:, 1:] = torch.arange(count * DRAFTS, dtype=torch.int32).view(count, -1) + count + 1
    noise = torch.Generator().manual_seed(9)
    at, accepted, outputs = [0] * count, [1] * count, [[] for _ in range(count)]
    for lengths, taken in steps:
        rows = []
        for stream in streams:
            pieces = []
            for i, length in enumerate(lengths):
                real = stream[i, at[i] : at[i] + taken[i]]
                pieces += [real, torch.randn(length - taken[i], *real.shape[1:], generator=noise).to(real.dtype)]
            rows.append(torch.cat(pieces))
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        metadata = GDNAttentionMetadata(
            0, 0, 0, 0, count, int(starts[-1]), int(starts[-1]), spec_query_start_loc=starts, spec_state_indices_tensor=slots,
            num_accepted_tokens=torch.tensor(accepted, dtype=torch.int32),
        )  # fmt: skip
        found = gdn_attention._spec_forward(made, metadata, *rows, conv, ssm, WIDTH, STATE)
        for i in range(count):
            outputs[i].append(found[int(starts[i]) : int(starts[i]) + taken[i]].clone())
        at = [a + t for a, t in zip(at, taken, strict=True)]
        accepted = list(taken)
    return [torch.cat(one).float() for one in outputs]


def difference(steps):
    random = torch.Generator().manual_seed(1)
    made, count = layer(random), len(steps[0][0])
    streams = [torch.randn(count, NUM_TOKENS, size, generator=random).bfloat16() for size in (CHANNELS, HEADS, HEADS)]
    one_by_one = [((DRAFTS + 1,) * count, (1,) * count)] * (NUM_TOKENS - DRAFTS)
    expected = ran(made, streams, one_by_one)
    try:
        found = ran(made, streams, steps)
    except RuntimeError as error:
        return str(error)[:100]
    return max(float((f - e[: len(f)]).norm() / e[: len(f)].norm()) for f, e in zip(found, expected, strict=True))


def native():
    """What the checks of the native kernel say to one token, as vLLM hands it over."""
    from vllm import _custom_ops

    token = torch.randn(3, 2 * CHANNELS).bfloat16()[1:2, :CHANNELS].contiguous()  # a part of a projection: the stride stays
    try:
        out = _custom_ops.causal_conv1d_fwd_cpu(
            x=token.transpose(0, 1), weight=torch.empty(0), bias=None, conv_states=None, query_start_loc=None, cache_indices=None,
            has_initial_state=None, silu_activation=True, is_weight_packed=True,
        )  # fmt: skip
    except RuntimeError as error:
        return str(error)
    return 0.0 if torch.equal(out, token.t()) else "another tensor"


def checking(x, **_):
    if x.stride(-2) != 1 or x.stride(-1) != x.size(-2):
        raise RuntimeError("causal_conv1d_fwd_cpu: expect x to be transposed.")
    return x


from vllm import _custom_ops  # noqa: E402

_custom_ops.causal_conv1d_fwd_cpu = checking
if sys.argv[1] == "mended":
    from mtpress.engine.plugins import gdn_cpu

    gdn_cpu.register()
    gdn_cpu.register()
found = {"short": difference(SHORT), "cut": difference(CUT), "native": native()}
Path(sys.argv[2]).write_text(json.dumps(found))
