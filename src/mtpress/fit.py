"""Which checkpoint fits on which GPU: its weights, and what a server needs beside them.

In: the bytes of the weights, config.json, the bits of a KV-cache entry. Out: for each size of GPU memory the tokens of
context there is room for. Leaves out: measuring it; this is an estimate from shapes, right to about ten percent of memory.

    room   = share·memory − weights − 2 GiB − state of one sequence
    tokens = room / bytes a token takes in the KV cache;  it fits where that is at least 8,192

share: 0.9, vLLM's default gpu_memory_utilization; 0.7 where host and GPU share the memory (GB10).
2 GiB: CUDA context, activations, CUDA graphs. State: what the Gated-DeltaNet layers keep a sequence, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtpress.models import qwen3_5

GIB = 1 << 30
RESERVED_BYTES = 2 * GIB
MIN_TOKENS = 8192
RULE = (
    "context: KV-cache tokens for which 90 % of the memory (70 % of 128 GB, which the host shares) has room beside the weights, "
    "2 GiB and one sequence's state; – where that is under 8,192"
)


@dataclass(frozen=True)
class Memory:
    """One size of GPU memory, as cards are sold."""

    gb: int
    num_bytes: int
    share: float = 0.9

    @property
    def name(self) -> str:
        return f"{self.gb} GB"


MEMORIES = (*(Memory(gb, gb * GIB) for gb in (16, 24, 32, 48, 80, 96)), Memory(128, 128_000_000_000, 0.7), Memory(141, 141_000_000_000))


def kv_bytes_per_token(config: Mapping[str, Any], kv_bits: int = 16) -> int:
    """Keys and values of one token in all full-attention layers and in the draft head's."""
    d = qwen3_5.sizes(config)
    num_layers = qwen3_5.layer_types(config).count("full_attention") + qwen3_5.num_mtp_layers(config)
    return num_layers * 2 * d["num_key_value_heads"] * d["head_dim"] * kv_bits // 8


def state_bytes(config: Mapping[str, Any]) -> int:
    """What the Gated-DeltaNet layers keep of one sequence: a float32 matrix a head, and the convolution's last inputs."""
    d = qwen3_5.sizes(config)
    keys = d["linear_num_key_heads"] * d["linear_key_head_dim"]
    values = d["linear_num_value_heads"] * d["linear_value_head_dim"]
    recurrent = 4 * values * d["linear_key_head_dim"]
    convolution = 2 * (2 * keys + values) * (d["linear_conv_kernel_dim"] - 1)
    return qwen3_5.layer_types(config).count("linear_attention") * (recurrent + convolution)


def context_tokens(weight_bytes: int, config: Mapping[str, Any], kv_bits: int = 16) -> dict[str, int]:
    """Memory ("24 GB") → tokens of context it has room for, 0 where the checkpoint does not fit."""
    per_token, state = kv_bytes_per_token(config, kv_bits), state_bytes(config)
    found = {}
    for memory in MEMORIES:
        room = int(memory.share * memory.num_bytes) - weight_bytes - RESERVED_BYTES - state
        tokens = room // max(per_token, 1)
        found[memory.name] = tokens if tokens >= MIN_TOKENS else 0
    return found
