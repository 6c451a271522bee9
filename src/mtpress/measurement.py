"""What a benchmark measured, and what follows from it: rates, latencies, draft acceptance, their spread over rounds, ratios.

In: the answers of single requests, cell by cell (`CellRun`). Out: `Spread`s of each metric over rounds and paired ratios to
a baseline. Leaves out: how the requests were sent (engine/bench_driver.py) and how the figures are shown.

A cell is one decode length at one number of parallel streams. Each round starts every configuration once, so a spread over
rounds holds what a restart changes and how the machine drifts, not only the noise of one start.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, order=True)
class Cell:
    """length: generated tokens of each request. streams: requests that are under way at the same time."""

    length: int
    streams: int

    def __str__(self) -> str:
        return f"{self.length} tokens × {self.streams} stream{'s' if self.streams != 1 else ''}"


@dataclass(frozen=True)
class Acceptance:
    """Counters of speculative decoding, as vLLM keeps them; sums of several runs are meaningful, means of rates are not."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    accepted_per_position: tuple[int, ...]

    @property
    def rate(self) -> float:
        """Accepted tokens / proposed tokens."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens a step of the target yields: its own one, and what it accepted of the draft's; vLLM's own definition."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def per_position(self) -> tuple[float, ...]:
        """Of all drafts, the share in which the token at this position was accepted; never rises from one position to the next."""
        return tuple(count / self.num_drafts if self.num_drafts else 0.0 for count in self.accepted_per_position)

    def __add__(self, other: "Acceptance") -> "Acceptance":
        positions = max(len(self.accepted_per_position), len(other.accepted_per_position))
        padded = [counts + (0,) * (positions - len(counts)) for counts in (self.accepted_per_position, other.accepted_per_position)]
        return Acceptance(
            self.num_drafts + other.num_drafts,
            self.num_draft_tokens + other.num_draft_tokens,
            self.num_accepted_tokens + other.num_accepted_tokens,
            tuple(a + b for a, b in zip(*padded, strict=True)),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "rate": self.rate,
            "mean_accepted_length": self.mean_accepted_length,
            "per_position": list(self.per_position),
        }


@dataclass(frozen=True)
class CellRun:
    """One cell of one start. seconds: from the first request sent to the last answer. The tuples hold one entry for each request
    that was answered: seconds to the first token, seconds to the last, tokens by the server's own count.

    acceptance: None where the server does not speculate, or where the prompts say nothing about it.
    """

    configuration: int
    round: int
    cell: Cell
    seconds: float
    ttft_seconds: tuple[float, ...]
    latency_seconds: tuple[float, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    num_failed: int = 0
    first_error: str = ""
    acceptance: Acceptance | None = None

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all streams / seconds of the cell."""
        return sum(self.output_tokens) / self.seconds

    @property
    def stream_tokens_per_second(self) -> float:
        """What one user sees, first token's wait included: median over requests of tokens / latency."""
        return median(tokens / latency for tokens, latency in zip(self.output_tokens, self.latency_seconds, strict=True))

    @property
    def decode_tokens_per_second(self) -> float:
        """What one user sees once the answer has begun: 1 / median TPOT; nan where answers have one token."""
        return 1 / median(self.tpot_seconds) if self.tpot_seconds else math.nan

    @property
    def tpot_seconds(self) -> tuple[float, ...]:
        """Time per output token after the first: (latency − TTFT) / (tokens − 1), so a step that yields three tokens counts for
        three. The gap between two chunks of the stream would not do: with MTP on, a chunk holds several tokens."""
        timed = zip(self.latency_seconds, self.ttft_seconds, self.output_tokens, strict=True)
        return tuple((latency - ttft) / (tokens - 1) for latency, ttft, tokens in timed if tokens > 1)

    @property
    def num_short(self) -> int:
        """Answers with fewer tokens than asked for."""
        return sum(tokens < self.cell.length for tokens in self.output_tokens)

    def as_json(self) -> dict[str, Any]:
        raw = asdict(self) | {"acceptance": self.acceptance.as_json() if self.acceptance else None}
        return raw | {"metrics": {name: number(metric(self)) for name, metric in METRICS.items()}}


def number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default; nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


METRICS: Mapping[str, Callable[[CellRun], float]] = {
    "tokens_per_second": lambda run: run.tokens_per_second,
    "stream_tokens_per_second": lambda run: run.stream_tokens_per_second,
    "decode_tokens_per_second": lambda run: run.decode_tokens_per_second,
    "ttft_median_seconds": lambda run: percentile(run.ttft_seconds, 50),
    "ttft_p99_seconds": lambda run: percentile(run.ttft_seconds, 99),
    "tpot_median_seconds": lambda run: percentile(run.tpot_seconds, 50),
    "tpot_p99_seconds": lambda run: percentile(run.tpot_seconds, 99),
    "acceptance_rate": lambda run: run.acceptance.rate if run.acceptance else math.nan,
    "mean_accepted_length": lambda run: run.acceptance.mean_accepted_length if run.acceptance else math.nan,
}


@dataclass(frozen=True)
class Spread:
    """A metric over rounds: its median, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """None of nothing; nan is nothing."""
        known = [value for value in values if not math.isnan(value)]
        return cls(median(known), min(known), max(known)) if known else None

    @property
    def relative(self) -> float:
        """(high − low) / median."""
        return (self.high - self.low) / self.median if self.median else 0.0

    def as_json(self) -> dict[str, float]:
        return asdict(self) | {"relative": self.relative}


@dataclass(frozen=True)
class CellSummary:
    """One cell of one configuration over all rounds.

    ratios: by metric, this configuration / the baseline, taken within each round and then over rounds: a machine that
    slows down between rounds slows both. None for a metric that one of the two lacks.
    """

    cell: Cell
    num_rounds: int
    num_requests: int
    num_failed: int
    num_short: int
    metrics: Mapping[str, Spread | None]
    ratios: Mapping[str, Spread | None]
    acceptance: Acceptance | None

    def as_json(self) -> dict[str, Any]:
        def plain(spreads: Mapping[str, Spread | None]) -> dict[str, Any]:
            return {name: spread.as_json() if spread else None for name, spread in spreads.items()}

        counts = {key: getattr(self, key) for key in ("num_rounds", "num_requests", "num_failed", "num_short")}
        acceptance = self.acceptance.as_json() if self.acceptance else None
        return asdict(self.cell) | counts | {"metrics": plain(self.metrics), "ratios": plain(self.ratios), "acceptance": acceptance}


RATIO_METRICS = ("tokens_per_second", "stream_tokens_per_second", "decode_tokens_per_second", "ttft_median_seconds", "tpot_median_seconds")


def summarize(runs: Sequence[CellRun], configuration: int, baseline: int) -> tuple[CellSummary, ...]:
    """The cells of one configuration, in the order in which they were first measured."""
    own = [run for run in runs if run.configuration == configuration]
    base = {(run.cell, run.round): run for run in runs if run.configuration == baseline}
    return tuple(_summary([run for run in own if run.cell == cell], base) for cell in dict.fromkeys(run.cell for run in own))


def _summary(runs: Sequence[CellRun], base: Mapping[tuple[Cell, int], CellRun]) -> CellSummary:
    pairs = [(run, base[run.cell, run.round]) for run in runs if (run.cell, run.round) in base]
    return CellSummary(
        cell=runs[0].cell,
        num_rounds=len(runs),
        num_requests=sum(len(run.output_tokens) for run in runs),
        num_failed=sum(run.num_failed for run in runs),
        num_short=sum(run.num_short for run in runs),
        metrics={name: Spread.of(metric(run) for run in runs) for name, metric in METRICS.items()},
        ratios={name: Spread.of(_ratio(METRICS[name], *pair) for pair in pairs) for name in RATIO_METRICS},
        acceptance=total_acceptance(runs),
    )


def _ratio(metric: Callable[[CellRun], float], run: CellRun, base: CellRun) -> float:
    below = metric(base)
    return metric(run) / below if below else math.nan


def total_acceptance(runs: Iterable[CellRun]) -> Acceptance | None:
    """The counters of all runs together; None where none has any."""
    total: Acceptance | None = None
    for run in runs:
        if run.acceptance is not None:
            total = run.acceptance if total is None else total + run.acceptance
    return total
