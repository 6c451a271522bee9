"""BenchResults made by hand, for the tests of tables, pictures and files."""

from typing import Any

from mtpress.bench.measurement import Cell, CellRun
from mtpress.bench.result import BenchResult, Configuration, Failure, ServerFacts
from mtpress.engine.server.metrics import SpecDecode

CELLS = tuple(Cell(length, streams) for length in (50, 350) for streams in (1, 2))
MACHINE = {"gpus": [], "cpu": "Some CPU", "num_cores": 2, "memory_bytes": 24 * 2**30, "system": "Linux"}


def run(configuration: int, round: int, cell: Cell, tokens_per_second: float, drafted: int) -> CellRun:
    """A run at exactly this total speed: one request a stream, of which the first third of a second passes before the first token."""
    seconds = cell.length * cell.streams / tokens_per_second
    counted = SpecDecode(100, 100 * drafted, 60 * drafted, tuple(80 - 20 * at for at in range(drafted))) if drafted else None
    each = cell.streams
    return CellRun(
        configuration, round, cell, seconds, (seconds / 3,) * each, (seconds,) * each, (20,) * each, (cell.length,) * each,
        spec_decode=counted,
    )  # fmt: skip


def result(builds: tuple[str, ...] = ("tiny",), mtp: tuple[int, ...] = (0, 2), rounds: int = 2, **changes: Any) -> BenchResult:
    """Each configuration is faster than the one before it by 100 tokens/s; round 2 is slower by a tenth."""
    configurations = tuple(
        Configuration(f"{build}, MTP {f'n={n}' if n else 'off'}", build, n, checkpoint=number)
        for number, build in enumerate(builds)
        for n in mtp
    )
    runs = tuple(
        run(number, round, cell, 100.0 * (number + 1) * cell.streams * (1 - 0.1 * round), configuration.num_speculative_tokens or 0)
        for round in range(rounds)
        for number, configuration in enumerate(configurations)
        for cell in CELLS
    )
    servers = tuple(
        ServerFacts(number, 0, f"vllm serve /home/me/{one.build}", 30.0, 4096, 123456, 30.14, "fp8")
        for number, one in enumerate(configurations)
    )
    fields: dict[str, Any] = {
        "command": "mtpress bench /home/me/tiny", "date": "2026-01-02T03:04:05+00:00", "engine": "0.32.0", "machine": MACHINE,
        "checkpoints": ({"name": "tiny"},), "prompts": {"source": "mtpress's mix of 45 prompts", "short": "45 prompts of its shipped mix"},
        "settings": {"rounds": rounds, "requests": 1, "temperature": 0.0, "natural_end": False, "running": False}, "cells": CELLS,
        "configurations": configurations, "baseline": 0, "servers": servers, "runs": runs, "failures": (),
    }  # fmt: skip
    return BenchResult(**{**fields, **changes})


FAILURE = Failure(1, 0, "the engine died: out of memory | really")
