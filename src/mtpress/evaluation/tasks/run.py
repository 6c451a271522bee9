"""Asks tasks of models one after another: starts each as `mtpress serve` would, or takes a server that runs.

In: checkpoints or addresses, tasks of lm-evaluation-harness. Out: a `TasksResult`. Leaves out: arguments (stages/eval.py), what a task
is (driver.py). Names, data sets and launches are looked at before the first start; a model that does not come up, or dies, is recorded,
and the others go on.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mtpress import terminal
from mtpress.api_key import API_KEY, split_login, without_login
from mtpress.engine.drivers import lm_eval
from mtpress.engine.drivers.process import DriverProcess, client_environment
from mtpress.engine.launch.installed import find_engine, python_at
from mtpress.engine.launch.launch import Launch, ServeOptions
from mtpress.engine.memory.hardware import read_hardware
from mtpress.engine.memory.served_model import ServedModel
from mtpress.engine.server.client import Client, is_address
from mtpress.engine.server.server import Server
from mtpress.errors import EngineError, InputError, MtpressError
from mtpress.evaluation.tasks.scores import Measured, TasksResult, measured
from mtpress.progress import Progress, human_seconds

DRIVER = Path(lm_eval.__file__)
THINKING_TOKENS = 32768
TRY = "pip install 'mtpress[lm-eval]', or name an environment that has it with --lm-eval PATH"


@dataclass(frozen=True)
class Asked:
    """What is asked, of each model alike. limit: questions of a task; streams: requests at the same time; max_gen_toks: of an answer,
    None for the task's own; gen_kwargs: sampling and the rest, over everything that is chosen here."""

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    streams: int = 16
    thinking: bool = False
    max_gen_toks: int | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """Of both kinds of requests (driver.py)."""
        return {"include_path": str(self.include_path.absolute()) if self.include_path is not None else None, "limit": self.limit}

    def generation(self) -> dict[str, Any]:
        """lm-eval's gen_kwargs. With thinking, a task's stop strings are left out: they would end the thoughts."""
        chosen: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": self.thinking}}
        if self.thinking:
            chosen |= {"until": [], "max_gen_toks": THINKING_TOKENS}
        if self.max_gen_toks is not None:
            chosen["max_gen_toks"] = self.max_gen_toks
        return chosen | self.gen_kwargs

    def as_json(self) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks), "limit": self.limit, "num_fewshot": self.num_fewshot, "streams": self.streams,
            "thinking": self.thinking, "gen_kwargs": self.generation(),
        }  # fmt: skip


class Harness(DriverProcess):
    """lm-eval in the environment of `python`. A context manager."""

    def __init__(self, python: Path, log: Path, api_key: str | None) -> None:
        super().__init__(python, DRIVER, log, client_environment(os.environ, api_key, offline=False), "lm-eval")

    def prepare(self, asked: Asked) -> dict[str, Any]:
        """What is behind the names, data fetched: tasks (name, output_type, num_docs), and the names that generate and that compare.

        InputError for a name that is none.
        """
        answer: dict[str, Any] = self.ask({"prepare": {"tasks": list(asked.tasks), **asked.request()}})
        if "refused" in answer:
            raise InputError(str(answer["refused"]))
        return answer


def find_harness(where: str | None) -> Path:
    """The python that has lm-eval: that of the environment, python or command named, else this one. InputError without one."""
    if where is not None:
        return python_at(where, "lm_eval", TRY)
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"lm-eval is not installed beside mtpress; {TRY}")
    return Path(sys.executable)


@dataclass(frozen=True)
class Target:
    """A model to ask: a checkpoint (model), or a server that runs (url, what it calls its model, its tokens of context, its login).

    name: what the result calls it; served: the directory or the address.
    """

    name: str
    served: str
    model: ServedModel | None = None
    url: str | None = None
    model_name: str = ""
    max_model_len: int = 0
    authorization: str | None = field(default=None, repr=False)

    @property
    def tokenizer(self) -> str | None:
        return str(self.model.path.absolute()) if self.model is not None else None


def targets_of(named: Sequence[str], api_key: str | None) -> list[Target]:
    """One for each checkpoint or address; names are made different. InputError or EngineError where one cannot be used."""
    found = []
    for text in named:
        if is_address(text):
            with Client(text, api_key) as client:
                found.append(
                    Target(client.model, without_login(text), None, client.url, client.model, client.max_model_len, split_login(text)[1])
                )
        else:
            model = ServedModel.read(text)
            found.append(Target(model.name, str(model.path), model))
    names = [target.name for target in found]
    for i, target in enumerate(found):
        if names.count(target.name) > 1:
            found[i] = replace(target, name=f"{target.name} ({target.served})")
    if len({target.name for target in found}) < len(found):
        raise InputError("a checkpoint or server is named twice")
    return found


def run_tasks(
    checkpoints: Sequence[str],
    base: str | None,
    asked: Asked,
    *,
    harness: str | None = None,
    engine: str | None = None,
    serve: ServeOptions | None = None,
    num_speculative_tokens: int | None = None,
    api_key: str | None = None,
    output: Path | None = None,
    silent: bool = False,
) -> TasksResult:
    """Asks the base, where there is one, and each checkpoint. output: a directory for lm-eval's own results, a file a model.

    InputError before anything starts where it cannot work; EngineError where nothing could be measured.
    """
    python = find_harness(harness)
    targets = targets_of([*([base] if base is not None else []), *checkpoints], api_key)
    launches = _launches(targets, asked, engine, serve or ServeOptions(), num_speculative_tokens)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    done: dict[str, Measured] = {}
    failures: dict[str, str] = {}
    logs = Path(tempfile.mkdtemp(prefix="mtpress-tasks-"))
    key = next((launch.environment[API_KEY] for launch in launches.values() if API_KEY in launch.environment), api_key)
    try:
        with Harness(python, logs / "lm-eval.log", key) as process:
            prepared = process.prepare(asked)
            tasks = prepared["tasks"]
            _refuse_tokenizers(targets, prepared["comparing"])
            count = sum(task["num_docs"] for task in tasks)
            _say(silent, f"{len(tasks)} tasks, {count:,} questions, of {len(targets)} models")
            for target in targets:
                file_name = target.name.replace("/", "-")
                results = output / f"{file_name}.json" if output is not None else None
                try:
                    with _served(target, launches.get(target.name), logs / f"{file_name}.log", silent) as served:
                        done[target.name] = _measure(process, target, asked, prepared, served, results, silent)
                except MtpressError as error:  # one that fails must not take hours of the others with it
                    failures[target.name] = str(error)
                    _say(silent, f"{target.name}: {error}")
    finally:
        if not failures:  # else their messages name the logs
            shutil.rmtree(logs, ignore_errors=True)
    if not done:
        raise EngineError(f"nothing was measured: {next(iter(failures.values()))}")
    first = done.get(targets[0].name) if base is not None else None
    others = tuple(done[target.name] for target in targets[int(base is not None) :] if target.name in done)
    return TasksResult(process.ready, asked.as_json(), first, others, failures)


def _launches(
    targets: Sequence[Target], asked: Asked, engine: str | None, serve: ServeOptions, num_speculative_tokens: int | None
) -> dict[str, Launch]:
    """Of each checkpoint: everything that can be refused is refused here."""
    models = {target.name: target.model for target in targets if target.model is not None}
    if not models:
        return {}
    found, hardware = find_engine(engine), read_hardware()
    return {
        name: serve.launch(model, found, hardware, num_speculative_tokens=num_speculative_tokens, max_num_seqs=asked.streams)
        for name, model in models.items()
    }


def _refuse_tokenizers(targets: Sequence[Target], comparing: Sequence[str]) -> None:
    """Likelihoods are compared token by token, so the tokenizer must be at hand."""
    without = [target.served for target in targets if target.tokenizer is None]
    if comparing and without:
        raise InputError(
            f"{comparing[0]} compares likelihoods, which takes the tokenizer, and of {without[0]} only the address is known; name its "
            "checkpoint in place of the address, or take tasks that generate"
        )


@dataclass(frozen=True)
class Served:
    """A server that answers: its address, what it calls the model, its tokens of context."""

    url: str
    model: str
    max_model_len: int


@contextmanager
def _served(target: Target, launch: Launch | None, log: Path, silent: bool) -> Iterator[Served]:
    if launch is None:
        assert target.url is not None
        yield Served(target.url, target.model_name, target.max_model_len)
        return
    _say(silent, f"{target.name}: starting")
    settings = launch.estimate.settings
    assert settings is not None
    with Server(launch, log, say=lambda line: None) as server:
        _say(silent, f"{target.name}: ready in {human_seconds(server.start_seconds or 0.0)}")
        yield Served(launch.url, launch.served_model_name, settings.max_model_len)


def _measure(
    process: Harness, target: Target, asked: Asked, prepared: dict[str, Any], served: Served, results: Path | None, silent: bool
) -> Measured:
    request = {
        **asked.request(), "generating": prepared["generating"], "comparing": prepared["comparing"], "num_fewshot": asked.num_fewshot,
        "url": served.url, "authorization": target.authorization, "model": served.model, "tokenizer": target.tokenizer,
        "max_length": served.max_model_len, "streams": asked.streams, "gen_kwargs": asked.generation(),
        "output": str(results.absolute()) if results is not None else None,
    }  # fmt: skip
    started = time.perf_counter()
    with Progress("eval", 0, unit="answers", silent=silent) as progress:

        def heard(news: dict[str, int]) -> None:
            progress.total += news.get("total", 0)
            if "done" in news:
                progress.advance(news["done"], target.name)

        answer = process.ask({"measure": request}, heard)
    return measured(target.name, target.served, answer, time.perf_counter() - started)


def _say(silent: bool, text: str) -> None:
    if not silent:
        terminal.say(f"eval  {text}", to=sys.stderr)
