"""What a launch takes of a GPU's memory, and how many tokens and sequences fit beside it.

In: a `ServedModel`, the settings of a launch, a `Hardware`. Out: a `MemoryEstimate`. Leaves out: choosing the settings (launch.py).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mtpress.engine.hardware import Hardware
from mtpress.engine.served_model import ServedModel


@dataclass(frozen=True)
class ServeSettings:
    """What of a launch decides over memory, by vLLM's own names. cpu_kv_bytes: VLLM_CPU_KVCACHE_SPACE; not None means the CPU platform."""

    max_model_len: int
    max_num_seqs: int
    kv_cache_dtype: str = "auto"
    num_speculative_tokens: int = 0
    language_model_only: bool = False
    gpu_memory_utilization: float = 0.92
    tensor_parallel_size: int = 1
    max_num_batched_tokens: int = 2048
    enforce_eager: bool = False
    prefix_caching: bool = True
    block_size: int | None = None
    cpu_kv_bytes: int | None = None


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes are those of one GPU.

    kv_bytes_per_token: all attention layers. state_bytes_per_sequence: all Gated-DeltaNet layers. kv_room_bytes: what is left for the
    KV cache. num_tokens, max_concurrency: vLLM's "KV cache size" and "Maximum concurrency" figures. num_sequences: that run at once.
    problem: why the launch cannot fit, or None; remedies: which setting frees how much.
    """

    weight_bytes: int
    weight_bytes_by_component: Mapping[str, int]
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    reserved_bytes: int
    kv_room_bytes: int
    num_tokens: int
    max_concurrency: float
    num_sequences: int
    problem: str | None
    remedies: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> tuple[str, ...]:
        """For people, one fact a line."""
        raise NotImplementedError


def estimate(model: ServedModel, settings: ServeSettings, hardware: Hardware) -> MemoryEstimate:
    """What the launch takes and what fits."""
    raise NotImplementedError
