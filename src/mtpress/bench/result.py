"""What `mtpress bench` gives back: configurations, servers, every measured cell, what failed, and the summaries of it.

In: nothing but its own fields. Out: `BenchResult` and its JSON. Leaves out: the arithmetic (measurement.py), tables
(markdown.py), pictures (chart.py).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from mtpress.bench.measurement import Cell, CellRun, CellSummary, summarize, total_spec_decode
from mtpress.engine.server.metrics import SpecDecode

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Configuration:
    """What is compared: a checkpoint with a number of drafted tokens (0: MTP off), or a server that is running (both None).

    build: the checkpoint's name, or the server's model. label: what tables and pictures call it.
    """

    label: str
    build: str
    num_speculative_tokens: int | None = None
    checkpoint: int | None = None
    url: str | None = None

    @property
    def mtp(self) -> str:
        return {None: "?", 0: "off"}.get(self.num_speculative_tokens, f"n={self.num_speculative_tokens}")


@dataclass(frozen=True)
class ServerFacts:
    """One start. start_seconds: until it answered. kv_cache_tokens and max_concurrency (requests of max_model_len at once): as the
    engine reports them. None where it says nothing, or was running before."""

    configuration: int
    round: int
    command: str | None
    start_seconds: float | None
    max_model_len: int | None
    kv_cache_tokens: int | None
    max_concurrency: float | None
    kv_cache_dtype: str | None


@dataclass(frozen=True)
class Failure:
    configuration: int
    round: int
    message: str


@dataclass(frozen=True)
class BenchResult:
    """command: the call. checkpoints: what identifies each. prompts, settings, machine: as they were. baseline: the configuration that
    ratios are to."""

    command: str
    date: str
    engine: str
    machine: Mapping[str, Any]
    checkpoints: tuple[Mapping[str, Any], ...]
    prompts: Mapping[str, Any]
    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]
    configurations: tuple[Configuration, ...]
    baseline: int
    servers: tuple[ServerFacts, ...]
    runs: tuple[CellRun, ...]
    failures: tuple[Failure, ...]

    @property
    def complete(self) -> bool:
        """Whether every configuration and every request gave an answer."""
        return not self.failures and not any(run.num_failed for run in self.runs)

    @cached_property
    def summaries(self) -> tuple[Mapping[Cell, CellSummary], ...]:
        """By configuration, then by cell; a configuration that never came up has none."""
        return tuple({s.cell: s for s in summarize(self.runs, number, self.baseline)} for number in range(len(self.configurations)))

    @property
    def largest_spread(self) -> float:
        """(highest − lowest) / median of a cell's speed over rounds, where that is largest; 0 with one round."""
        speeds = (summary.metrics["tokens_per_second"] for cells in self.summaries for summary in cells.values())
        return max((speed.relative for speed in speeds if speed is not None), default=0.0)

    def spec_decode(self, configuration: int) -> SpecDecode | None:
        """The counters of all cells and rounds of one configuration."""
        return total_spec_decode(run.spec_decode for run in self.runs if run.configuration == configuration)

    def server(self, configuration: int) -> ServerFacts | None:
        """The first start of a configuration."""
        return next((server for server in self.servers if server.configuration == configuration), None)

    def without_paths(self, names: Mapping[str, str]) -> "BenchResult":
        """The same with paths of this machine (long → short) taken out of the commands, for what others will read."""

        def shorten(text: str) -> str:
            for long in sorted(names, key=len, reverse=True):
                text = text.replace(long, names[long])
            return text

        servers = tuple(replace(s, command=shorten(s.command) if s.command else None) for s in self.servers)
        failures = tuple(replace(failure, message=shorten(failure.message)) for failure in self.failures)
        return replace(self, command=shorten(self.command), servers=servers, failures=failures)

    def as_json(self) -> dict[str, Any]:
        configurations = []
        for number, configuration in enumerate(self.configurations):
            counted = self.spec_decode(number)
            configurations.append(
                asdict(configuration)
                | {"spec_decode": counted.as_json() if counted else None}
                | {"cells": [summary.as_json() for summary in self.summaries[number].values()]}
            )
        return {
            "format_version": FORMAT_VERSION,
            "command": self.command,
            "date": self.date,
            "engine": self.engine,
            "machine": dict(self.machine),
            "checkpoints": [dict(checkpoint) for checkpoint in self.checkpoints],
            "prompts": dict(self.prompts),
            "settings": dict(self.settings),
            "baseline": self.baseline,
            "largest_spread": self.largest_spread,
            "configurations": configurations,
            "failures": [asdict(failure) for failure in self.failures],
            "servers": [asdict(server) for server in self.servers],
            "runs": [run.as_json() for run in self.runs],
        }
