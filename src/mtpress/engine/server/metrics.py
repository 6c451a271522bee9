"""What a running engine counts: the text of its /metrics page in, speculative decoding, KV cache and token counters out.

Names are those of vLLM 0.32 (Prometheus; counters end in _total). The series of several engines or models behind one server are
added. Leaves out: rates over time, which are differences of two of these (a - b), and anything that is no counter of vLLM's.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from mtpress.errors import EngineError

DRAFTS, DRAFT_TOKENS, ACCEPTED = (f"vllm:spec_decode_num_{name}_total" for name in ("drafts", "draft_tokens", "accepted_tokens"))
ACCEPTED_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
CACHE_CONFIG = "vllm:cache_config_info"
COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
}
READ = (DRAFTS, DRAFT_TOKENS, ACCEPTED, ACCEPTED_PER_POSITION, *COUNTERS.values())
MAX_COUNT, MAX_POSITIONS, MAX_LINE = 1e18, 1024, 1 << 16


@dataclass(frozen=True)
class SpecDecode:
    """Counters of speculative decoding. accepted_per_position[i]: how often the draft's token i + 1 was accepted."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: tuple[int, ...] = ()

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens; 0 where nothing was drafted."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that one pass of the target yields: 1 + accepted / drafts, as vLLM logs it; 1 where nothing was drafted."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def per_position(self) -> tuple[float, ...]:
        """The share of drafts whose token at this position was accepted."""
        return tuple(accepted / self.num_drafts if self.num_drafts else 0.0 for accepted in self.accepted_per_position)

    def __sub__(self, before: "SpecDecode") -> "SpecDecode":
        """What was counted since `before`, an earlier reading of the same server."""
        positions = before.accepted_per_position or (0,) * len(self.accepted_per_position)
        assert len(positions) == len(self.accepted_per_position), "two servers"
        return SpecDecode(
            self.num_drafts - before.num_drafts,
            self.num_draft_tokens - before.num_draft_tokens,
            self.num_accepted_tokens - before.num_accepted_tokens,
            tuple(after - then for after, then in zip(self.accepted_per_position, positions, strict=True)),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            "acceptance_rate": round(self.acceptance_rate, 4),
            "mean_accepted_length": round(self.mean_accepted_length, 4),
            "per_position": [round(share, 4) for share in self.per_position],
        }


@dataclass(frozen=True)
class KvCache:
    """The KV cache as the engine reports it. labels: every label of vllm:cache_config_info, as text.

    num_tokens: what the log calls "KV cache size". max_concurrency: requests of max_model_len that fit at once. None where
    this version does not say.
    """

    num_tokens: int | None
    max_concurrency: float | None
    num_blocks: int | None
    block_size: int | None
    dtype: str | None
    labels: Mapping[str, str] = field(repr=False, default_factory=dict)

    @classmethod
    def from_labels(cls, labels: Mapping[str, str]) -> Self:
        tokens, concurrency = _number(labels.get("kv_cache_size_tokens")), _number(labels.get("kv_cache_max_concurrency"))
        blocks, size = _number(labels.get("num_gpu_blocks")), _number(labels.get("block_size"))
        return cls(
            num_tokens=None if tokens is None else int(tokens),
            max_concurrency=concurrency,
            num_blocks=None if blocks is None else int(blocks),
            block_size=None if size is None else int(size),
            dtype=labels.get("cache_dtype"),
            labels=dict(labels),
        )


@dataclass(frozen=True)
class Metrics:
    """One reading. spec_decode is None on a server without speculative decoding, kv_cache where it says nothing of it."""

    spec_decode: SpecDecode | None
    kv_cache: KvCache | None
    prompt_tokens: int
    generation_tokens: int
    preemptions: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """EngineError where the text is no Prometheus page."""
        from prometheus_client.parser import text_string_to_metric_families

        if any(len(line) > MAX_LINE for line in text.splitlines()):
            raise EngineError(f"/metrics is no page of Prometheus metrics (a line of over {MAX_LINE} characters); is this a vLLM server?")

        counted: defaultdict[str, float] = defaultdict(float)
        positions: defaultdict[int, float] = defaultdict(float)
        labels: Mapping[str, str] | None = None
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name in READ and not 0 <= sample.value < MAX_COUNT:
                        raise ValueError(f"{sample.name} is {sample.value}")
                    counted[sample.name] += sample.value
                    if sample.name == ACCEPTED_PER_POSITION:
                        if not 0 <= (position := int(sample.labels["position"])) < MAX_POSITIONS:
                            raise ValueError(f"there is no position {position}")
                        positions[position] += sample.value
                    elif sample.name == CACHE_CONFIG and labels is None:
                        labels = sample.labels
        except Exception as error:  # the parser meets what is no page with errors of every kind
            raise EngineError(f"/metrics is no page of Prometheus metrics ({str(error)[:120]}); is this a vLLM server?") from None
        spec_decode = None
        if DRAFTS in counted:
            accepted = tuple(int(positions[position]) for position in range(max(positions, default=-1) + 1))
            spec_decode = SpecDecode(int(counted[DRAFTS]), int(counted[DRAFT_TOKENS]), int(counted[ACCEPTED]), accepted)
        kv_cache = None if labels is None else KvCache.from_labels(labels)
        return cls(spec_decode, kv_cache, **{key: int(counted[name]) for key, name in COUNTERS.items()})


def _number(text: str | None) -> float | None:
    """vLLM writes Python's str() of whatever it holds: "None" is no number."""
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if 0 <= number < MAX_COUNT else None
