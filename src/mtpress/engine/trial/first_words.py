"""The first request to an engine that has just come up: does it answer, how fast, and is its draft head accepted.

In: a client, and how many tokens the engine drafts. Out: `FirstWords`. Leaves out: judging what is said (canaries.py) and measuring
in earnest (bench): one short request on a cold engine shows a dead one, not a slow one.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtpress.engine.server.metrics import SpecDecode

if TYPE_CHECKING:
    from mtpress.engine.server.client import Client

PROMPT = "Tell me a story."  # any model has one, and it is long enough to draft in
MAX_TOKENS = 64
SHOWN = 60
CHECK = "`mtpress check` says whether the weights are sound"


@dataclass(frozen=True)
class FirstWords:
    """text: what came, reasoning included. tokens_per_second: of decoding, from the first token on; None for fewer than two.

    first_token_seconds: on a cold engine, so kernels may have been compiled in it. spec_decode: what this request drafted; None
    where nothing is drafted.
    """

    text: str
    num_tokens: int
    first_token_seconds: float
    tokens_per_second: float | None
    spec_decode: SpecDecode | None
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "num_tokens": self.num_tokens,
            "first_token_seconds": round(self.first_token_seconds, 3),
            "tokens_per_second": None if self.tokens_per_second is None else round(self.tokens_per_second, 1),
            "spec_decode": None if self.spec_decode is None else self.spec_decode.as_json(),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        """One line for people."""
        text = " ".join(self.text.split())
        parts = [f'"{text[:SHOWN]}{"…" if len(text) > SHOWN else ""}"', f"{self.num_tokens} tokens"]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        parts.append(f"first token after {self.first_token_seconds:.2f} s")
        if self.spec_decode is not None and self.spec_decode.num_drafts:
            spec = self.spec_decode
            parts.append(f"{spec.num_accepted_tokens} of {spec.num_draft_tokens} drafted tokens accepted ({spec.acceptance_rate:.0%})")
        return ", ".join(parts)


def first_words(client: "Client", num_speculative_tokens: int) -> FirstWords:
    """Asks one short question, greedily. EngineError where the request fails; what is odd about its answer is a warning."""
    before = client.metrics().spec_decode
    texts: list[str] = []
    num_tokens = 0
    started = first = last = time.perf_counter()
    stream = client.stream_chat([{"role": "user", "content": PROMPT}], max_tokens=MAX_TOKENS, temperature=0)
    for chunk in stream:
        if usage := chunk.get("usage"):
            num_tokens = usage["completion_tokens"]
        for choice in chunk.get("choices", ()):
            if said := _said(choice.get("delta", {})):
                last = time.perf_counter()
                first = first if texts else last
                texts.append(said)
    text = "".join(texts)
    after = client.metrics().spec_decode
    spec = None if after is None else after if before is None else after - before
    rate = (num_tokens - 1) / (last - first) if num_tokens > 1 and last > first else None
    return FirstWords(text, num_tokens, first - started, rate, spec, tuple(_warnings(text, spec, num_speculative_tokens)))


def _said(delta: dict[str, Any]) -> str:
    """Text of either kind; older builds say reasoning_content."""
    return "".join(part for key in ("reasoning", "reasoning_content", "content") if isinstance(part := delta.get(key), str))


def _warnings(text: str, spec: SpecDecode | None, num_speculative_tokens: int) -> list[str]:
    said = []
    if not text.strip():
        said.append(f"the first answer is empty; {CHECK}")
    elif len(text) >= 8 and len(set(text.strip())) <= 2:  # what NaN logits decode to
        said.append(f"the first answer is {text.strip()[:8]!r} and so on; {CHECK}")
    if num_speculative_tokens and spec is None:
        said.append(f"{num_speculative_tokens} drafted tokens were asked for, but this server drafts none")
    elif num_speculative_tokens and spec is not None and spec.num_draft_tokens and not spec.num_accepted_tokens:
        said.append(
            f"none of {spec.num_draft_tokens} drafted tokens was accepted: a draft head that is missing, random or wrongly quantized costs "
            f"speed and shows nowhere else; {CHECK}"
        )
    return said
