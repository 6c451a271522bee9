"""Runs a benchmark: starts every configuration once a round, measures every cell within each start, and tells how long it will take.

In: a `BenchPlan`, made and checked before anything starts. Out: the runs, servers and failures of a `BenchResult`. Leaves out:
arguments and files (stages/bench.py), the servers' own life (engine/server/server.py).

Rounds go through the configurations to and fro (A B C, C B A, …), so that a machine that warms up or slows down does not favour
the first. A configuration that does not come up, or dies, is recorded and left out from then on; the others go on.
"""

import contextlib
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from mtpress import terminal
from mtpress.bench.client import BenchClient, Load
from mtpress.bench.measurement import Cell, CellRun
from mtpress.bench.prompt_mix import RANDOM, PromptMix
from mtpress.bench.result import Configuration, Failure, ServerFacts
from mtpress.engine.launch.installed import Engine
from mtpress.engine.launch.launch import Launch, ServeOptions
from mtpress.engine.memory.hardware import Hardware
from mtpress.engine.memory.served_model import ServedModel
from mtpress.engine.server.client import Client
from mtpress.engine.server.server import Server
from mtpress.errors import EngineError, InputError, MtpressError
from mtpress.json_files import json_string
from mtpress.progress import human_seconds

WARM_TOKENS = 16
RANDOM_PROMPT_TOKENS = 256
START = "start"
RUNS = "runs.jsonl"


@dataclass(frozen=True)
class BenchPlan:
    """All that is decided before the first start. requests: at least so many a cell; twice the streams where that is more."""

    configurations: tuple[Configuration, ...]
    models: tuple[ServedModel, ...]
    engine: Engine
    hardware: Hardware
    cells: tuple[Cell, ...]
    rounds: int
    requests: int
    prompts: PromptMix
    temperature: float = 0.0
    natural_end: bool = False
    serve: ServeOptions = field(default_factory=ServeOptions)
    api_key: str | None = field(default=None, repr=False)
    addresses: tuple[str, ...] = field(default=(), repr=False)  # of running servers, as given: they may hold a login

    def num_requests(self, cell: Cell) -> int:
        return max(self.requests, 2 * cell.streams)

    def order(self, round_number: int) -> list[int]:
        """Configurations in the order of this round."""
        forward = list(range(len(self.configurations)))
        return forward if round_number % 2 == 0 else forward[::-1]

    def launch(self, configuration: Configuration) -> Launch:
        """The launch of one start, on a port that is free now."""
        assert configuration.checkpoint is not None
        return self.serve.launch(
            self.models[configuration.checkpoint],
            self.engine,
            self.hardware,
            num_speculative_tokens=configuration.num_speculative_tokens,
            max_num_seqs=max(cell.streams for cell in self.cells),
        )

    def check_prompts(self, configuration: Configuration, max_model_len: int) -> None:
        """InputError if a prompt and the longest decode are more than the context."""
        longest = max(cell.length for cell in self.cells)
        if configuration.checkpoint is None:
            return
        if self.prompts.kind == RANDOM:
            prompt = RANDOM_PROMPT_TOKENS
        else:
            prompt = self.prompts.longest_tokens(self.models[configuration.checkpoint].path / "tokenizer.json")
        if prompt + longest > max_model_len:
            raise InputError(
                f"{configuration.label}: a prompt of {prompt} tokens and {longest} more do not fit a context of {max_model_len}; raise "
                "--max-model-len, shorten --lengths, or leave the longest prompts out"
            )


class Benchmark:
    """One run of a plan. folder: where the logs of the engine and of the client go, and each measured cell as soon as it is there (RUNS).
    say: one line of progress at a time."""

    def __init__(self, plan: BenchPlan, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.plan, self.folder = plan, folder
        self.say = say or _to_stderr
        self.servers: list[ServerFacts] = []
        self.runs: list[CellRun] = []
        self.failures: list[Failure] = []
        self.schedule = Schedule(plan)

    def run(self) -> None:
        """Fills servers, runs and failures. EngineError if nothing at all could be measured; Ctrl-C passes through."""
        plan = self.plan
        self.dataset = self.folder / "prompts.jsonl"
        if plan.prompts.kind != RANDOM:
            plan.prompts.write(self.dataset)
        with BenchClient(plan.engine, self.folder / "client.log", plan.api_key) as client:
            for round_number in range(plan.rounds):
                for number in plan.order(round_number):
                    if not any(failure.configuration == number for failure in self.failures):
                        self._start(client, number, round_number)
        if not self.runs:
            raise EngineError(f"nothing was measured: {self.failures[0].message}")

    def _start(self, client: BenchClient, number: int, round_number: int) -> None:
        configuration = self.plan.configurations[number]
        try:
            with self._served(number, round_number) as (url, model):
                self._warm_up(client, url, model)
                for cell in self.plan.cells:
                    self._measure(client, url, model, number, round_number, cell)
        except MtpressError as error:  # one that fails must not take hours of the others with it
            self.failures.append(Failure(number, round_number, str(error)))
            self.schedule.drop(number)
            self.say(f"{configuration.label}: {error}; the others go on")

    @contextmanager
    def _served(self, number: int, round_number: int) -> Iterator[tuple[str, str]]:
        """The address, with its login, and the model name of a server of this configuration."""
        configuration = self.plan.configurations[number]
        if configuration.url is not None:
            with Client(self.plan.addresses[number], self.plan.api_key) as client:
                self.servers.append(_facts(number, round_number, client, None, None))
            yield self.plan.addresses[number].rstrip("/").removesuffix("/v1"), configuration.build
            return
        launch = self.plan.launch(configuration)
        self._tell(round_number, f"{configuration.label}: starting")
        started = time.monotonic()
        with Server(launch, self.folder / f"{number + 1}-{round_number + 1}.engine.log", say=lambda line: None) as server:
            seconds = server.start_seconds or time.monotonic() - started
            self.servers.append(_facts(number, round_number, server.client, launch, seconds))
            self.schedule.done(number, START, seconds)
            yield launch.url, launch.served_model_name

    def _warm_up(self, client: BenchClient, url: str, model: str) -> None:
        """One short wave at each number of streams: what an engine compiles, captures or allocates late is not measured."""
        for streams in sorted({cell.streams for cell in self.plan.cells}):
            client.measure(self._load(Cell(WARM_TOKENS, streams), streams, "warm-up"), url, model, acceptance=False)

    def _measure(self, client: BenchClient, url: str, model: str, number: int, round_number: int, cell: Cell) -> None:
        started = time.monotonic()
        load = self._load(cell, self.plan.num_requests(cell), f"{number}-{round_number}-{cell}")
        acceptance = self.plan.prompts.kind != RANDOM
        run = client.measure(load, url, model, configuration=number, round=round_number, acceptance=acceptance)
        self.runs.append(run)
        with contextlib.suppress(OSError), (self.folder / RUNS).open("a", encoding="utf-8") as journal:  # a full disk ends no measuring
            journal.write(json_string({"label": self.plan.configurations[number].label, **run.as_json()}) + "\n")
        self.schedule.done(number, cell, time.monotonic() - started)
        accepted = f", accepted length {run.spec_decode.mean_accepted_length:.2f}" if run.spec_decode else ""
        failed = f", {run.num_failed} requests failed ({run.first_error})" if run.num_failed else ""
        speed = f"{run.tokens_per_second:,.1f} tokens/s{accepted}{failed}"
        self._tell(round_number, f"{self.plan.configurations[number].label}: {cell}: {speed}")

    def _load(self, cell: Cell, num_requests: int, salt: str) -> Load:
        random = self.plan.prompts.kind == RANDOM
        return Load(
            cell,
            num_requests,
            dataset=None if random else self.dataset,
            tokenizer=self.plan.models[0].path if random else None,
            random_prompt_tokens=RANDOM_PROMPT_TOKENS,
            temperature=self.plan.temperature,
            natural_end=self.plan.natural_end,
            salt=f"{time.time_ns()}-{salt}",
        )

    def _tell(self, round_number: int, text: str) -> None:
        left = self.schedule.left()
        ahead = f"  {human_seconds(left)} left" if left else ""
        self.say(f"round {round_number + 1}/{self.plan.rounds}  {text}{ahead}")


class Schedule:
    """How long the rest will take: each start and cell as it took before, with this configuration, or else this build, or any."""

    def __init__(self, plan: BenchPlan) -> None:
        self.ahead: dict[tuple[int, Cell | str], int] = {}
        for number, configuration in enumerate(plan.configurations):
            steps: tuple[Cell | str, ...] = plan.cells if configuration.url else (START, *plan.cells)
            self.ahead |= {(number, what): plan.rounds for what in steps}
        self.builds = [configuration.build for configuration in plan.configurations]
        self.weights = {cell: cell.length * plan.num_requests(cell) / cell.streams for cell in plan.cells}
        self.seen: defaultdict[tuple[int, Cell | str], list[float]] = defaultdict(list)

    def done(self, number: int, what: Cell | str, seconds: float) -> None:
        self.seen[number, what].append(seconds)
        self.ahead[number, what] -= 1

    def drop(self, number: int) -> None:
        self.ahead = {step: count for step, count in self.ahead.items() if step[0] != number}

    def left(self) -> float | None:
        """Seconds, or None while no cell has been measured."""
        if not any(isinstance(what, Cell) for _, what in self.seen):
            return None
        return sum(count * self._guess(number, what) for (number, what), count in self.ahead.items() if count)

    def _guess(self, number: int, what: Cell | str) -> float:
        own = {number}
        same_build = {other for other, build in enumerate(self.builds) if build == self.builds[number]}
        for alike in (own, same_build, set(range(len(self.builds)))):
            if known := [seconds for (other, step), s in self.seen.items() if other in alike and step == what for seconds in s]:
                return fmean(known)
            rates = [fmean(s) / self.weights[w] for (other, w), s in self.seen.items() if other in alike and isinstance(w, Cell)]
            if isinstance(what, Cell) and rates:
                return fmean(rates) * self.weights[what]
        return 0.0


def _facts(number: int, round_number: int, client: Client, launch: Launch | None, seconds: float | None) -> ServerFacts:
    try:
        kv_cache = client.metrics().kv_cache
    except MtpressError:  # not a vLLM server
        kv_cache = None
    settings = launch.estimate.settings if launch is not None else None
    return ServerFacts(
        configuration=number,
        round=round_number,
        command=launch.shown().replace(shlex.join(launch.command[: launch.command.index("serve")]), "vllm") if launch is not None else None,
        start_seconds=seconds,
        max_model_len=settings.max_model_len if settings is not None else None,
        kv_cache_tokens=kv_cache.num_tokens if kv_cache is not None else None,
        max_concurrency=kv_cache.max_concurrency if kv_cache is not None else None,
        kv_cache_dtype=kv_cache.dtype if kv_cache is not None else None,
    )


def _to_stderr(line: str) -> None:
    terminal.say(f"bench  {line}", to=sys.stderr)
