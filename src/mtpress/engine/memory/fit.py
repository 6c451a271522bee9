"""Which checkpoint fits on which GPU, for the table of `mtpress inspect`.

In: the bytes of the weights, config.json, the dtype of the KV cache. Out: for each size of GPU memory the longest context it has
room for, by the memory model of `mtpress serve` (engine/memory/kv_blocks.py, engine/memory/reserved.py). Leaves out: settings; the table is
for one sequence, a draft of one token and vLLM's other defaults.

    room   = share · memory − weights − reserved
    tokens = (blocks − a sequence's states − vLLM's own block) · tokens of a block;  it fits where that is at least 8,192

share: 0.9 is near vLLM's default gpu_memory_utilization; 0.7 where host and GPU share the memory (GB10).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtpress.engine.memory.kv_blocks import kv_blocks
from mtpress.engine.memory.reserved import reserved_bytes
from mtpress.models.qwen3_5 import names as qwen3_5

GIB = 1 << 30
MIN_TOKENS = 8192
MAX_NUM_BATCHED_TOKENS = 2048  # vLLM's default on cards below 70 GB
RULE = (
    "context: the longest sequence for which vLLM's KV cache has room in 90 % of the memory (70 % of 128 GB, which the host shares), "
    "one at a time, with MTP drafting one token; – where that is under 8,192"
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


def context_tokens(weight_bytes: int, config: Mapping[str, Any], kv_cache_dtype: str = "auto", *, vision: bool = False) -> dict[str, int]:
    """Memory ("24 GB") → tokens of context it has room for, 0 where the checkpoint does not fit. vision: the tower is served too."""
    draft = min(1, qwen3_5.num_mtp_layers(config))
    blocks = kv_blocks(config, kv_cache_dtype=kv_cache_dtype, num_speculative_tokens=draft)
    reserved = reserved_bytes(
        config, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS, max_num_seqs=1, num_speculative_tokens=draft, vision=vision
    )
    found = {}
    for memory in MEMORIES:
        room = int(memory.share * memory.num_bytes) - weight_bytes - reserved
        tokens = blocks.longest_sequence(max(0, room) // blocks.bytes_per_block)
        found[memory.name] = tokens if tokens >= MIN_TOKENS else 0
    return found
