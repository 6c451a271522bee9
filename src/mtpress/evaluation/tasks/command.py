"""`mtpress eval --tasks`: its arguments, its call, its table.

In: the parsed command line. Out: an exit code and a `TasksResult`, printed or as JSON or Markdown. Leaves out: the asking (run.py).
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress import terminal
from mtpress.api_key import KEY_VARIABLES, given_key
from mtpress.engine.server.client import is_address
from mtpress.errors import InputError

if TYPE_CHECKING:
    from mtpress.evaluation.tasks.scores import TasksResult

OF_DOCUMENTS = ("data", "calibration", "plots", "scratch")
OF_TASKS = (
    "include_path", "num_fewshot", "thinking", "max_gen_toks", "gen_kwargs", "lm_eval", "lm_eval_results", "engine", "profile", "mtp",
    "max_model_len", "api_key",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "tasks",
        "With --tasks nothing of the above is measured: each model is served, or is running where CKPT or SRC is the address of a server, "
        "and is asked tasks of lm-evaluation-harness (mtpress[lm-eval]), with standard errors. Everything after -- goes to `vllm serve`.",
    ).add_argument
    add("--tasks", metavar="LIST", help="names of tasks, groups or tags: gsm8k,ifeval,mmlu")
    add("--include-path", metavar="DIR", help="a directory with task files of your own")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    add("--thinking", action="store_true", help="let it think; up to 32768 tokens an answer, and no stop strings but the model's own")
    add("--max-gen-toks", type=int, metavar="N", help="tokens of an answer (default: the task's)")
    add(
        "--gen-kwargs",
        metavar="JSON",
        help='what requests carry besides: \'{"temperature": 1.0, "top_p": 0.95, "top_k": 20}\' (default: greedy)',
    )
    add("--streams", type=int, default=16, metavar="N", help="requests at the same time (default %(default)s)")
    add("--lm-eval", metavar="PATH", help="its environment, python or command, where it is not beside mtpress")
    add("--lm-eval-results", metavar="DIR", help="write lm-eval's own results there, every answer among them, a file a model")
    add("--engine", metavar="PATH", help="the vLLM to use: an environment, its python or its vllm command")
    add("--profile", metavar="NAME", help="how to serve (see mtpress serve); default: by the machine")
    add("--mtp", type=int, metavar="N", help="drafted tokens (default: the profile's)")
    add("--max-model-len", type=int, metavar="N", help="context length (default: the profile's)")
    add("--api-key", metavar="KEY", help=f"the key of running servers; better in {KEY_VARIABLES[0]}: ps shows this")


def refuse_without_tasks(options: argparse.Namespace) -> None:
    """InputError for what only tasks have a use for."""
    if addresses := [text for text in options.checkpoints if is_address(text)]:
        raise InputError(f"{addresses[0]}: a running server is asked --tasks; to compare on documents name its checkpoint")
    foreign = [f"--{name.replace('_', '-')}" for name in OF_TASKS if getattr(options, name)] + ["--"] * bool(options.engine_arguments)
    if foreign:
        raise InputError(f"{foreign[0]} is for --tasks; without them nothing is served")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Tasks in place of the comparison on documents. 1: there are no scores of one of the models."""
    from mtpress.engine.launch.launch import ServeOptions
    from mtpress.evaluation.tasks.run import Asked, run_tasks

    refuse_range(options, {"num_fewshot": 0, "max_gen_toks": 1, "streams": 1, "mtp": 0, "max_model_len": 1})
    if foreign := [name for name in OF_DOCUMENTS if getattr(options, name)]:
        raise InputError(f"--{foreign[0].replace('_', '-')} is for documents, not for --tasks; leave one of them out")
    tasks = tuple(filter(None, (name.strip() for name in options.tasks.split(","))))
    if not tasks:
        raise InputError("--tasks names no task; write them as gsm8k,ifeval")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise InputError(f"--include-path {options.include_path}: no such directory")
    asked = Asked(
        tasks,
        Path(options.include_path) if options.include_path is not None else None,
        options.limit,
        options.num_fewshot,
        options.streams,
        options.thinking,
        options.max_gen_toks,
        read_gen_kwargs(options.gen_kwargs),
    )
    result = run_tasks(
        options.checkpoints, options.base, asked, harness=options.lm_eval, engine=options.engine,
        serve=ServeOptions(options.profile, options.max_model_len, extra=options.engine_arguments), num_speculative_tokens=options.mtp,
        api_key=given_key(options.api_key), output=Path(options.lm_eval_results) if options.lm_eval_results else None, silent=options.json,
    )  # fmt: skip
    if options.markdown is not None:
        write_text(Path(options.markdown), result.markdown())
    if not options.json:
        show(result)
    return int(bool(result.failures)), result.as_json()


def read_gen_kwargs(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"--gen-kwargs {text}: no JSON object; write it as '{{\"temperature\": 1.0}}'")
    return found


def show(result: "TasksResult") -> None:
    """A row for each metric on stdout."""
    from rich import box
    from rich.table import Table

    from mtpress.evaluation.tasks.scores import HEADINGS

    console = terminal.console()
    table = Table(box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in ("questions", "score", "Δ") else "left", overflow="fold")
    for row in result.rows():
        table.add_row(*row)
    console.print(table)
    console.print(result.note, soft_wrap=True)
    for name, reason in result.failures.items():
        console.print(f"{name}: {reason}", soft_wrap=True)


def refuse_range(options: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Numbers of the command line: from their least to a million."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= 1_000_000:
            raise InputError(f"--{name.replace('_', '-')} {value}: from {low} to 1000000")


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
