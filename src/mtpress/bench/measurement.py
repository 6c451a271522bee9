"""What a benchmark measured, and what follows from it: rates, latencies, draft acceptance, their spread over rounds, ratios.

In: the answers of single requests, cell by cell (`CellRun`). Out: `Spread`s of each metric over rounds and paired ratios to
a baseline. Leaves out: how the requests were sent (driver.py) and how the figures are shown.

A cell is one decode length at one number of parallel streams. Each round starts every configuration once, so a spread over
rounds holds what a restart changes and how the machine drifts, not only the noise of one start.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from mtpress.engine.server.metrics import SpecDecode


@dataclass(frozen=True, order=True)
class Cell:
    """length: generated tokens of each request. streams: requests that are under way at the same time."""

    length: int
    streams: int

    def __str__(self) -> str:
        return f"{self.length} tokens × {self.streams} stream{'s' if self.streams != 1 else ''}"


@dataclass(frozen=True)
class CellRun:
    """One cell of one start. seconds: from the first request sent to the last answer. The tuples hold one entry for each request
    that was answered: seconds to the first token, seconds to the last, tokens by the server's own count.

    spec_decode: what the server's counters grew by; None where it does not speculate, or where the prompts say nothing about it.
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
    spec_decode: SpecDecode | None = None

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
        raw = asdict(self) | {"spec_decode": self.spec_decode.as_json() if self.spec_decode else None}
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
    "acceptance_rate": lambda run: run.spec_decode.acceptance_rate if run.spec_decode else math.nan,
    "mean_accepted_length": lambda run: run.spec_decode.mean_accepted_length if run.spec_decode else math.nan,
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
    spec_decode: SpecDecode | None

    def as_json(self) -> dict[str, Any]:
        def plain(spreads: Mapping[str, Spread | None]) -> dict[str, Any]:
            return {name: spread.as_json() if spread else None for name, spread in spreads.items()}

        counts = {key: getattr(self, key) for key in ("num_rounds", "num_requests", "num_failed", "num_short")}
        counted = self.spec_decode.as_json() if self.spec_decode else None
        return asdict(self.cell) | counts | {"metrics": plain(self.metrics), "ratios": plain(self.ratios), "spec_decode": counted}


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
        spec_decode=total_spec_decode(run.spec_decode for run in runs),
    )


def _ratio(metric: Callable[[CellRun], float], run: CellRun, base: CellRun) -> float:
    below = metric(base)
    return metric(run) / below if below else math.nan


def total_spec_decode(counted: Iterable[SpecDecode | None]) -> SpecDecode | None:
    """The counters added up, since rates of unequal runs cannot be averaged; None where there are none."""
    known = [one for one in counted if one is not None]
    if not known:
        return None
    positions = max(len(one.accepted_per_position) for one in known)
    return SpecDecode(
        sum(one.num_drafts for one in known),
        sum(one.num_draft_tokens for one in known),
        sum(one.num_accepted_tokens for one in known),
        tuple(sum(one.accepted_per_position[at] for one in known if at < len(one.accepted_per_position)) for at in range(positions)),
    )
