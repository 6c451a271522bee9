"""The order of a benchmark, its failures and its estimate of the time left, with servers and clients that are pretended."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench_results import run as cell_run
from mtpress.bench import benchmark
from mtpress.bench.benchmark import START, WARM_TOKENS, Benchmark, BenchPlan, Schedule
from mtpress.bench.client import Load
from mtpress.bench.measurement import Cell, CellRun
from mtpress.bench.prompt_mix import load_prompts
from mtpress.bench.result import Configuration
from mtpress.engine.launch.installed import Engine
from mtpress.engine.memory.hardware import Hardware
from mtpress.errors import EngineError, InputError

CELLS = (Cell(50, 1), Cell(50, 8))


def plan(configurations: int = 3, rounds: int = 3, **changes: Any) -> BenchPlan:
    made = BenchPlan(
        configurations=tuple(Configuration(f"c{n}", "build", n, checkpoint=0) for n in range(configurations)),
        models=(), engine=Engine(Path("python"), ("vllm",), "0.32.0", "cpu"), hardware=Hardware((), 1, 1, 1), cells=CELLS,
        rounds=rounds, requests=5, prompts=load_prompts("mix"),
    )  # fmt: skip
    return replace(made, **changes)


class Pretended:
    """What was started and measured, in order; broken: (configuration, round) that stays down; dying: one that dies in its 2nd cell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: set[tuple[int, int]], dying: set[int]) -> None:
        self.started: list[tuple[int, int]] = []
        self.loads: list[tuple[str, Load]] = []
        self.running: list[str] = []
        self.dying = dying
        outer = self

        class Client:
            def __init__(self, *_: Any) -> None: ...

            def __enter__(self) -> "Client":
                return self

            def __exit__(self, *_: object) -> None: ...

            def measure(
                self, load: Load, url: str, model: str, *, configuration: int = 0, round: int = 0, acceptance: bool = True
            ) -> CellRun:
                assert outer.running == [url], "measured while another server runs, or none does"
                outer.loads.append((url, load))
                if load.cell == CELLS[1] and configuration in outer.dying:
                    raise EngineError("it died")
                return cell_run(configuration, round, load.cell, 100.0, configuration)

        @contextmanager
        def served(ran: Benchmark, number: int, round_number: int) -> Iterator[tuple[str, str]]:
            outer.started.append((round_number, number))
            if (number, round_number) in broken:
                raise EngineError("it did not come up")
            outer.running.append(f"http://{number}")
            ran.schedule.done(number, START, 30.0)
            try:
                yield f"http://{number}", "model"
            finally:
                outer.running.pop()

        monkeypatch.setattr(benchmark, "BenchClient", Client)
        monkeypatch.setattr(Benchmark, "_served", served)


def pretend(monkeypatch: pytest.MonkeyPatch, broken: set[tuple[int, int]] | None = None, dying: set[int] | None = None) -> Pretended:
    return Pretended(monkeypatch, broken or set(), dying or set())


def test_rounds_go_to_and_fro_with_every_configuration_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended = pretend(monkeypatch)
    ran = Benchmark(plan(), tmp_path, say=lambda line: None)
    ran.run()
    assert pretended.started == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 1), (1, 0), (2, 0), (2, 1), (2, 2)]
    assert {(run.configuration, run.round, run.cell) for run in ran.runs} == {(c, r, x) for c in range(3) for r in range(3) for x in CELLS}
    assert ran.failures == []


def test_every_start_is_warmed_up_before_it_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended = pretend(monkeypatch)
    Benchmark(plan(configurations=1, rounds=2), tmp_path, say=lambda line: None).run()
    cells = [load.cell for _, load in pretended.loads]
    assert cells == [Cell(WARM_TOKENS, 1), Cell(WARM_TOKENS, 8), *CELLS] * 2
    assert [load.num_requests for _, load in pretended.loads[:4]] == [1, 8, 5, 16]


def test_every_cell_has_a_salt_of_its_own_and_the_same_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended = pretend(monkeypatch)
    Benchmark(plan(), tmp_path, say=lambda line: None).run()
    loads = [load for _, load in pretended.loads]
    assert len({load.salt for load in loads}) == len(loads)
    assert {load.dataset for load in loads} == {tmp_path / "prompts.jsonl"}


def test_one_that_does_not_come_up_is_told_and_not_tried_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended, told = pretend(monkeypatch, broken={(1, 0)}), list[str]()
    ran = Benchmark(plan(rounds=2), tmp_path, say=told.append)
    ran.run()
    assert pretended.started == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 0)]
    assert [(f.configuration, f.round, f.message) for f in ran.failures] == [(1, 0, "it did not come up")]
    assert {run.configuration for run in ran.runs} == {0, 2}
    assert any("c1: it did not come up; the others go on" in line for line in told)


def test_what_was_measured_before_an_engine_died_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, dying={2})
    ran = Benchmark(plan(rounds=1), tmp_path, say=lambda line: None)
    ran.run()
    assert [run.cell for run in ran.runs if run.configuration == 2] == [CELLS[0]]
    assert ran.failures[0].message == "it died"


def test_if_nothing_comes_up_that_is_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, broken={(0, 0), (1, 0), (2, 0)})
    with pytest.raises(EngineError, match="nothing was measured: it did not come up"):
        Benchmark(plan(), tmp_path, say=lambda line: None).run()


def test_ctrl_c_is_no_failure_of_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended = pretend(monkeypatch)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark.BenchClient, "measure", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Benchmark(plan(), tmp_path, say=lambda line: None).run()
    assert pretended.running == []


def test_time_left_is_that_of_what_has_been_seen() -> None:
    schedule = Schedule(plan(configurations=2, rounds=2))
    assert schedule.left() is None
    schedule.done(0, START, 30.0)
    schedule.done(0, CELLS[0], 10.0)  # 250 tokens one after another
    # 3 starts, 3 of the first cell, and 4 of the second: 16 requests in 8 streams, 100 tokens one after another
    assert schedule.left() == pytest.approx(3 * 30 + 3 * 10 + 4 * 4.0)
    schedule.done(0, CELLS[1], 6.0)
    assert schedule.left() == pytest.approx(3 * 30 + 3 * 10 + 3 * 6.0)
    schedule.drop(1)
    assert schedule.left() == pytest.approx(30 + 10 + 6.0)


def test_prompts_that_do_not_fit_are_refused_with_the_numbers() -> None:
    from mtpress.builtin import BUILTIN_MODEL

    model: Any = SimpleNamespace(path=BUILTIN_MODEL)
    made = plan(configurations=1, models=(model,), cells=(Cell(700, 1),))
    made.check_prompts(made.configurations[0], 4096)
    with pytest.raises(InputError, match="and 700 more do not fit a context of 1024; raise --max-model-len"):
        made.check_prompts(made.configurations[0], 1024)
