"""bench: how fast checkpoints are served, and how well their draft heads guess, by vLLM's own client on the real engine.

In: checkpoints (each with MTP off and on), or servers that are running. Out: a `BenchResult`; with --out a directory of bench.json,
bench.md, bench.svg, bench.png and the logs. Leaves out: how a checkpoint is launched (engine/launch/launch.py), what is measured how
(docs/benchmarking.md).
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress import terminal
from mtpress.api_key import API_KEY, KEY_VARIABLES, given_key
from mtpress.engine.launch.arguments import take_engine_arguments
from mtpress.errors import EngineError, InputError, MtpressError, ResourceError
from mtpress.json_files import json_bytes
from mtpress.terminal import json_text, say

if TYPE_CHECKING:
    from rich.table import Table

    from mtpress.bench.benchmark import BenchPlan
    from mtpress.bench.result import BenchResult
    from mtpress.engine.launch.launch import ServeOptions

LENGTHS, STREAMS, MTP = (50, 350, 700), (1, 2, 64), (0, 1, 2, 3)
MAX_DRAFTED = 16
LOGS = "logs"


def bench(
    checkpoints: Sequence[str | Path] = (),
    *,
    urls: Sequence[str] = (),
    mtp: Sequence[int] = MTP,
    lengths: Sequence[int] = LENGTHS,
    streams: Sequence[int] = STREAMS,
    rounds: int = 2,
    requests: int = 10,
    prompts: str = "mix",
    baseline: str | None = None,
    temperature: float = 0.0,
    natural_end: bool = False,
    engine: str | None = None,
    serve: "ServeOptions | None" = None,
    model: str | None = None,
    api_key: str | None = None,
    logs: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> "BenchResult":
    """Measures every cell (lengths × streams) of every configuration (checkpoints × mtp, or urls), `rounds` times.

    mtp: numbers of drafted tokens, 0 for off. baseline: label or number (from 1) of the configuration that ratios are to.
    logs: a directory for what the engines print; without one it is thrown away. InputError before anything starts where the
    call cannot work; EngineError where nothing could be measured. A configuration that fails is in the result's failures.
    """
    from mtpress.bench.benchmark import RUNS, Benchmark, BenchPlan
    from mtpress.bench.configurations import baseline_of, configurations_of, refuse_random, running
    from mtpress.bench.facts import describe_machine, identity, prompt_facts
    from mtpress.bench.measurement import Cell
    from mtpress.bench.prompt_mix import load_prompts
    from mtpress.bench.result import BenchResult
    from mtpress.checkpoint.record import command_line
    from mtpress.engine.launch.installed import find_engine
    from mtpress.engine.launch.launch import ServeOptions
    from mtpress.engine.memory.hardware import read_hardware
    from mtpress.engine.memory.served_model import ServedModel

    if bool(checkpoints) == bool(urls):
        raise InputError("name checkpoints to start, or servers that are running with --url, and not both")
    mix = load_prompts(prompts)
    models = tuple(ServedModel.read(path) for path in checkpoints)
    configurations = configurations_of(models, mtp) if models else running(urls, model, api_key)
    if mix.kind == "random":
        refuse_random(configurations)
    plan = BenchPlan(
        configurations=configurations,
        models=models,
        engine=find_engine(engine),
        hardware=read_hardware(),
        cells=tuple(Cell(length, number) for length in dict.fromkeys(lengths) for number in dict.fromkeys(streams)),
        rounds=rounds,
        requests=requests,
        prompts=mix,
        temperature=temperature,
        natural_end=natural_end,
        serve=serve or ServeOptions(),
        api_key=api_key,
        addresses=tuple(urls),
    )
    chosen = baseline_of(baseline, configurations)
    plan = replace(plan, api_key=_check_launches(plan) or plan.api_key)
    machine = describe_machine(plan.hardware) | ({"note": "of the client; the server may be elsewhere"} if urls else {})
    identities = tuple(identity(one) for one in models)  # before anything is measured: what breaks here must not cost hours
    folder = logs or Path(tempfile.mkdtemp(prefix="mtpress-bench-"))
    ran = Benchmark(plan, folder, say)
    try:
        ran.run()
    except (MtpressError, KeyboardInterrupt) as error:
        if ran.runs:
            error.args = (f"{error}{'; ' if str(error) else ''}what was measured is in {folder / RUNS}",)
        raise
    finally:
        if logs is None and (not ran.runs or sys.exception() is None):
            shutil.rmtree(folder, ignore_errors=True)
    settings = {"rounds": rounds, "requests": requests, "temperature": temperature, "natural_end": natural_end, "running": bool(urls)}
    return BenchResult(
        command=command_line(),
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
        engine=plan.engine.version,
        machine=machine,
        checkpoints=identities,
        prompts=prompt_facts(mix),
        settings=settings,
        cells=plan.cells,
        configurations=configurations,
        baseline=chosen,
        servers=tuple(ran.servers),
        runs=tuple(ran.runs),
        failures=tuple(ran.failures),
    )


def _check_launches(plan: "BenchPlan") -> str | None:
    """Everything that can be refused is refused here: launches that cannot fit, prompts that are too long. Gives the launches' API key."""
    key = None
    for number, configuration in enumerate(plan.configurations):
        if configuration.checkpoint is not None:
            launch = plan.launch(configuration)
            key = launch.environment.get(API_KEY, key)
            settings = launch.estimate.settings
            assert settings is not None
            plan.check_prompts(configuration, settings.max_model_len)
        elif configuration.url is not None:
            _check_running(plan, plan.addresses[number], configuration.build)
    return key


def _check_running(plan: "BenchPlan", url: str, model: str) -> None:
    """Asks the longest prompt with the longest decode and hangs up at the first token: context, key and streaming are as needed."""
    from mtpress.engine.server.client import Client

    longest = max(plan.prompts.prompts, key=lambda prompt: len(prompt.text))
    length = max(cell.length for cell in plan.cells)
    with Client(url, plan.api_key) as client:
        chunks = client.stream_chat(longest.messages, model=model, max_completion_tokens=length)
        try:
            next(chunks, None)
        except InputError as error:
            raise InputError(f"the longest prompt with {length} tokens to follow: {error}") from None
        finally:
            chunks.close()  # type: ignore[attr-defined]  # a generator: closing it cancels the request


def write_report(result: "BenchResult", folder: Path, *, plot: bool = True) -> list[str]:
    """Writes bench.json and bench.md, and with plot the pictures, into an existing folder; gives their names."""
    from mtpress.bench.markdown import markdown

    names = ["bench.json", "bench.md"]
    (folder / "bench.json").write_bytes(json_bytes(result.as_json(), indent=1))
    (folder / "bench.md").write_text(markdown(result, "bench.png" if plot else None), encoding="utf-8")
    if plot:
        from mtpress.bench.chart import draw

        try:
            names += [path.name for path in draw(result, folder)]
        except (ValueError, RuntimeError) as error:  # a font, a label; the figures are worth more than their picture
            say(f"bench  no pictures: {error}", to=sys.stderr)
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoints", metavar="CKPT", nargs="*", help="one or more directories or Hub ids, compared in one run")
    add("--url", action="append", default=[], metavar="URL", help="measure a server that is running instead; may be repeated")
    add("--model", metavar="NAME", help="with --url: which of its models (default: the first)")
    add("--api-key", metavar="KEY", help=f"with --url: its key; better in {KEY_VARIABLES[0]}: ps shows this")
    add("--mtp", type=_mtp, default=MTP, metavar="LIST", help="drafted tokens to compare (default: off,1,2,3)")
    add("--lengths", type=_numbers, default=LENGTHS, metavar="LIST", help="tokens of each answer (default: 50,350,700)")
    add("--streams", type=_numbers, default=STREAMS, metavar="LIST", help="requests at the same time (default: 1,2,64)")
    add("--rounds", type=_positive, default=2, metavar="N", help="starts of each configuration (default: 2; 3 to publish)")
    add("--requests", type=_positive, default=10, metavar="N", help="at least so many a cell, and twice the streams (default: 10)")
    add("--prompts", default="mix", metavar="FILE", help="JSON lines of messages, mix (default: the shipped one), or random (MTP off only)")
    add("--baseline", metavar="LABEL", help="what ratios are to: a label or its number (default: the first configuration)")
    add("--temperature", type=_temperature, default=0.0, metavar="T", help="sampling temperature (default: 0, greedy)")
    add("--natural-end", action="store_true", help="let answers end by themselves; lengths are then upper limits")
    add("--out", metavar="DIR", type=Path, help="a new directory for bench.json, bench.md, bench.svg, bench.png and logs")
    add("--no-plot", action="store_true", help="no pictures; they need matplotlib (mtpress[bench])")
    add("--engine", metavar="PATH", help="the vLLM to use: an environment, its python or its vllm command")
    add("--profile", metavar="NAME", help="how to serve (see mtpress serve); default: by the machine")
    add("--max-model-len", type=_positive, metavar="N", help="context length (default: the profile's)")
    add("--max-num-seqs", type=_positive, metavar="N", help="sequences at once (default: the largest of --streams)")
    add("--kv-cache-dtype", metavar="DTYPE", help="KV cache dtype (default: the profile's)")
    add("--force", action="store_true", help="start what a known issue would refuse")
    parser.usage = f"{parser.prog} [options] CKPT... [-- ENGINE ARGUMENTS]\n       {parser.prog} [options] --url URL"
    parser.epilog = "Everything after -- goes to every `vllm serve` as it stands and wins over what mtpress chooses."
    take_engine_arguments(parser)


def _numbers(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers like 50,350,700")
    return tuple(int(word) for word in words)


def _mtp(text: str) -> tuple[int, ...]:
    words = [word.strip().lower() for word in text.split(",")]
    if not all(word == "off" or (word.isdigit() and int(word) <= MAX_DRAFTED) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list like off,1,2,3 (at most {MAX_DRAFTED})")
    return tuple(0 if word == "off" else int(word) for word in words)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no temperature between 0 and 2")
    return value


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: 1 where a configuration or a request failed."""
    from mtpress.engine.launch.launch import ServeOptions

    out: Path | None = options.out
    plot = out is not None and not options.no_plot
    if out is not None and out.exists():
        raise InputError(f"{out}: exists; name a new directory")
    if plot:
        from mtpress.bench.chart import require_matplotlib

        require_matplotlib()
    serve = ServeOptions(
        options.profile,
        options.max_model_len,
        options.max_num_seqs,
        options.kv_cache_dtype,
        options.force,
        options.engine_arguments,
    )
    if options.url and serve != ServeOptions():
        raise InputError("with --url nothing is started, so there is nothing to say of how; leave out the options of serving")
    partial = _make_partial(out) if out is not None else None
    try:
        result = bench(
            options.checkpoints,
            urls=options.url,
            mtp=options.mtp,
            lengths=options.lengths,
            streams=options.streams,
            rounds=options.rounds,
            requests=options.requests,
            prompts=options.prompts,
            baseline=options.baseline,
            temperature=options.temperature,
            natural_end=options.natural_end,
            engine=options.engine,
            serve=serve,
            model=options.model,
            api_key=given_key(options.api_key),
            logs=partial / LOGS if partial is not None else None,
        )
        result = result.without_paths(_shortened(options.checkpoints, out))
    except BaseException as error:
        if partial is not None and not _has_measurements(partial) and not (isinstance(error, EngineError) and _has_logs(partial)):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    written = _finish(result, partial, out, plot, options.json) if partial is not None and out is not None else []
    if not options.json:
        show(result)
        for path in written:
            say(path)
    return (0 if result.complete else 1), result.as_json() | {"written": written}


def _make_partial(out: Path) -> Path:
    """OUT.partial; what an earlier run that failed left of it is replaced."""
    partial = out.with_name(out.name + ".partial")
    if _has_measurements(partial):
        raise InputError(f"{partial}: holds what an earlier run measured; move it away, or choose another --out")
    try:
        if (partial / LOGS).is_dir() and {path.name for path in partial.iterdir()} == {LOGS}:
            shutil.rmtree(partial)
        (partial / LOGS).mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{partial}: cannot be made ({error.strerror or error}); choose another --out, or remove it") from None
    return partial


def _has_measurements(partial: Path) -> bool:
    from mtpress.bench.benchmark import RUNS

    return (partial / "bench.json").exists() or (partial / LOGS / RUNS).exists()


def _has_logs(partial: Path) -> bool:
    return any(path.suffix == ".log" for path in (partial / LOGS).iterdir())


def _finish(result: "BenchResult", partial: Path, out: Path, plot: bool, as_json: bool) -> list[str]:
    """Whatever fails here, the measurements are kept: in the partial directory, else printed."""
    from mtpress.bench.benchmark import RUNS

    try:
        names = write_report(result, partial, plot=plot)
        for name in ("prompts.jsonl", RUNS):  # the mix is known by its hash, the runs are in bench.json
            (partial / LOGS / name).unlink(missing_ok=True)
        partial.rename(out)
    except OSError as error:
        reason = error.strerror or error
        if _is_whole(partial / "bench.json", result):
            raise ResourceError(f"{out}: cannot be written ({reason}); what was measured is in {partial / 'bench.json'}") from None
        print(json_text(result.as_json()), file=sys.stderr if as_json else sys.stdout)
        raise ResourceError(f"{partial}: cannot be written ({reason}); what was measured is printed above, as bench.json has it") from None
    return [str(out / name) for name in names]


def _is_whole(path: Path, result: "BenchResult") -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["date"] == result.date)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _shortened(checkpoints: Sequence[str], out: Path | None) -> dict[str, str]:
    """Paths of this machine and what to show instead: their last part."""
    paths = [*checkpoints, *(str(Path(c).resolve()) for c in checkpoints), *([str(out)] if out is not None else []), sys.prefix]
    partial = {f"{out}.partial": out.name} if out is not None else {}  # where logs were while it ran
    return {path: Path(path).name for path in paths if path.startswith("/")} | partial


def show(result: "BenchResult") -> None:
    """A table for each number of streams, acceptance and what failed, on stdout."""

    from mtpress.bench.markdown import acceptance_rows, failure_part, lengths_and_streams, summary_note

    console = terminal.console()
    for streams in lengths_and_streams(result)[1]:
        console.print(_speed_table(result, streams))
    console.print(summary_note(result), soft_wrap=True)
    for label, rate, length, *shares in acceptance_rows(result):
        line = f"{label}: acceptance {rate}, mean accepted length {length}, by position {' '.join(shares)}"
        console.print(line, soft_wrap=True)
    for part in failure_part(result)[1:]:
        console.print(part, soft_wrap=True)


def _speed_table(result: "BenchResult", streams: int) -> "Table":
    """Total tokens/s and × baseline by length; narrow enough for a terminal of 80 columns."""
    from rich import box
    from rich.table import Table

    from mtpress.bench.markdown import lengths_and_streams, plain
    from mtpress.bench.measurement import Cell

    lengths = [length for length in lengths_and_streams(result)[0] if Cell(length, streams) in result.cells]
    table = Table("1 stream, tok/s" if streams == 1 else f"{streams} streams, total tok/s", box=box.SIMPLE_HEAD)
    for length in lengths:
        table.add_column(str(length), justify="right")
        table.add_column("×", justify="right", style="dim")
    for configuration, summaries in zip(result.configurations, result.summaries, strict=True):
        cells = []
        for length in lengths:
            found = summaries.get(Cell(length, streams))
            cells += [plain(found.metrics["tokens_per_second"]) if found else "–"]
            cells += [plain(found.ratios["tokens_per_second"], 2) if found else ""]
        table.add_row(configuration.label, *cells)
    return table
