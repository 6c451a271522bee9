"""One process of vLLM's benchmark client, asked for one cell after another.

In: the engine whose client it is, the address of a running server, a cell. Out: a `CellRun`. Leaves out: the server's life
(server.py), and which cells are measured when (benchmark.py). What runs on the other side is driver.py.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpress.api_key import split_login
from mtpress.bench.measurement import Cell, CellRun
from mtpress.engine.drivers import vllm_bench
from mtpress.engine.drivers.process import DriverProcess, client_environment
from mtpress.engine.launch.installed import Engine
from mtpress.engine.server.metrics import SpecDecode
from mtpress.errors import EngineError

DRIVER = Path(vllm_bench.__file__)


@dataclass(frozen=True)
class Load:
    """What is asked of a server. dataset: JSON lines as PromptMix.write makes them; None for random tokens, which need a tokenizer.

    salt: keeps what an earlier cell left in the prefix cache from serving this one (vLLM's cache_salt).
    """

    cell: Cell
    num_requests: int
    dataset: Path | None = None
    tokenizer: Path | None = None
    random_prompt_tokens: int = 256
    temperature: float = 0.0
    natural_end: bool = False
    salt: str = ""

    def arguments(self, url: str, model: str) -> list[str]:
        """The arguments of `vllm bench serve` for this load.

        Its own test request is left out (--ready-check-timeout-sec 0): it decodes to the full length and the server is up.
        Token counts come from the server's `usage`, so no tokenizer is loaded; without one vLLM would ask for one token,
        hence max_completion_tokens. The template is the server's. A login of the address becomes a header, which vLLM does not print.
        """
        url, authorization = split_login(url)
        body: dict[str, Any] = {"cache_salt": self.salt} if self.salt else {}
        shared = [
            "--base-url", url, "--model", model, "--served-model-name", model, "--num-prompts", str(self.num_requests),
            "--max-concurrency", str(self.cell.streams), "--temperature", str(self.temperature), "--seed", "0",
            "--ready-check-timeout-sec", "0", "--save-detailed", "--disable-tqdm", *([] if self.natural_end else ["--ignore-eos"]),
            *(["--header", f"Authorization={authorization}"] if authorization else []),
        ]  # fmt: skip
        if self.dataset is None:
            source = [
                "--backend", "openai", "--endpoint", "/v1/completions", "--tokenizer", str(self.tokenizer), "--dataset-name", "random",
                "--random-input-len", str(self.random_prompt_tokens), "--random-output-len", str(self.cell.length),
            ]  # fmt: skip
        else:
            body["max_completion_tokens"] = self.cell.length
            source = [
                "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--skip-tokenizer-init",
                "--dataset-name", "custom", "--dataset-path", str(self.dataset.absolute()), "--custom-output-len", str(self.cell.length),
                "--disable-shuffle",
            ]  # fmt: skip
        return [*shared, *source, *(["--extra-body", json.dumps(body)] if body else [])]


class BenchClient(DriverProcess):
    """A context manager; entering it waits until vLLM's client is imported. What it prints goes to `log`.

    InputError where that vLLM cannot measure, EngineError where the client dies.
    """

    def __init__(self, engine: Engine, log: Path, api_key: str | None = None) -> None:
        super().__init__(engine.python, DRIVER, log, client_environment(os.environ, api_key), "vLLM's benchmark client")

    def measure(self, load: Load, url: str, model: str, *, configuration: int = 0, round: int = 0, acceptance: bool = True) -> CellRun:
        """Runs one cell; EngineError where no request at all was answered."""
        result = self.ask({"arguments": load.arguments(url, model)}, about=str(load.cell))
        return cell_run(result, load.cell, configuration, round, acceptance)


def cell_run(result: Mapping[str, Any], cell: Cell, configuration: int, round: int, acceptance: bool) -> CellRun:
    """The driver's result as a CellRun: requests that failed are counted, not timed."""
    errors: Sequence[str] = result["errors"]
    answered = [number for number, error in enumerate(errors) if not error and result["latency_seconds"][number] > 0]
    failed = [error for error in errors if error]
    first_error = failed[0].strip().splitlines()[-1][:300] if failed else ""
    if not answered:
        raise EngineError(f"{cell}: none of {len(errors)} requests was answered: {first_error or 'no reason given'}")

    def of_answered(key: str) -> tuple[Any, ...]:
        return tuple(result[key][number] for number in answered)

    counted = result["acceptance"] if acceptance else None
    return CellRun(
        configuration=configuration,
        round=round,
        cell=cell,
        seconds=result["seconds"],
        ttft_seconds=of_answered("ttft_seconds"),
        latency_seconds=of_answered("latency_seconds"),
        prompt_tokens=of_answered("prompt_tokens"),
        output_tokens=of_answered("output_tokens"),
        num_failed=len(errors) - len(answered),
        first_error=first_error,
        spec_decode=None if counted is None else spec_decode(counted),
    )


def spec_decode(counted: Mapping[str, Any]) -> SpecDecode:
    """vLLM's client gives shares of the drafts by position; the counters they were made of are whole numbers."""
    drafts = counted["num_drafts"]
    positions = tuple(round(share * drafts) for share in counted["per_position"])
    return SpecDecode(drafts, counted["num_draft_tokens"], counted["num_accepted_tokens"], positions)
