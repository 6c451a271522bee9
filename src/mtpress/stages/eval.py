"""eval: how far checkpoints are from their BF16 base, on the same tokens.

In: checkpoints in any form that vLLM serves, the base, JSON lines. Out: an `EvalResult`, printed, as JSON, Markdown and plots.
With --tasks in place of that: benchmark tasks asked of the served models (mtpress/tasks/), a `TasksResult`.
Leaves out: the measuring (mtpress/evaluation/); this file puts it in order. The hidden states wait in a folder of their own below
--scratch, which is gone afterwards.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress import terminal
from mtpress.checkpoint.record import peak_memory_bytes
from mtpress.device import choose_device
from mtpress.engine.launch.arguments import take_engine_arguments
from mtpress.errors import InputError, ResourceError
from mtpress.evaluation.tasks import command as task_command
from mtpress.evaluation.tasks.command import refuse_range, write_text
from mtpress.progress import Progress, human_bytes

if TYPE_CHECKING:
    from mtpress.evaluation.documents import Documents
    from mtpress.evaluation.result import EvalResult

MAX_SEQ_LEN = 2048
RESAMPLES = 1000
SPARE_BYTES = 64 << 20  # of the disk that hidden states are written to


def evaluate(
    checkpoints: Sequence[str | Path],
    base: str | Path,
    data: Sequence[str] = (),
    *,
    calibration: Sequence[str] = (),
    max_seq_len: int = MAX_SEQ_LEN,
    limit: int | None = None,
    kv_cache: str = "auto",
    resamples: int = RESAMPLES,
    seed: int = 0,
    scratch: str | Path | None = None,
    device: str = "auto",
    silent: bool = False,
) -> "EvalResult":
    """Compares the checkpoints with the base in one pass over it. data: JSON-lines files or "builtin"; empty means the latter.

    kv_cache: "auto" rounds keys and values to FP8 where a checkpoint declares such a cache, "bf16" and "fp8" decide for all of them.
    calibration: files that the checkpoints may have been calibrated on, to be held against the documents. limit: documents of a set.
    InputError, before weights are read, for what cannot be compared; FindingError, which names the tensors, where a body computes NaN;
    ResourceError where the disk cannot hold the hidden states.
    """
    from mtpress.chat.encoder import ChatEncoder
    from mtpress.evaluation import documents, figures, result
    from mtpress.evaluation.bodies import open_bodies
    from mtpress.evaluation.drafts import draft, drafts_effort
    from mtpress.evaluation.layers import Stream, layers_effort, refuse_pictures, run_layers
    from mtpress.evaluation.no_number import no_number
    from mtpress.evaluation.vocabulary import compare_logits, logits_effort
    from mtpress.models.hidden_states import DiskStates

    if not checkpoints:
        raise InputError("name at least one checkpoint")
    started = time.perf_counter()
    source, others = open_bodies(base, checkpoints, kv_cache)
    loaded = documents.load(ChatEncoder(source.checkpoint.path), source.checkpoint.config, data, max_seq_len, limit)
    refuse_pictures([source, *others], loaded)
    disjoint = {body.name: documents.check_disjoint(loaded, body.checkpoint, calibration) for body in others}
    counted = figures.Counted(loaded, resamples, seed)
    hidden_size = source.checkpoint.text_config["hidden_size"]
    folder = Path(scratch) if scratch is not None else Path(tempfile.gettempdir())
    refuse_small_disk(folder, loaded, hidden_size, len(others))
    chosen = choose_device(device)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mtpress-eval-", dir=folder)))
        streams = [
            stack.enter_context(closing(Stream(body, loaded, directory / str(i), chosen, body.no_draft_head is None)))
            for i, body in enumerate((source, *others))
        ]
        total = layers_effort(streams) + logits_effort(streams) + sum(drafts_effort(stream) for stream in streams)
        progress = stack.enter_context(Progress("eval", total, unit="tokens·layers", silent=silent))
        progress.say(f"{len(loaded.samples)} documents, {loaded.num_tokens:,} tokens; {len(others)} checkpoints beside the base")
        errors = run_layers(streams[0], streams[1:], directory, progress)
        of_base, *of_others = compare_logits(streams[0], streams[1:], progress)
        for stream, tokens in zip(streams, (of_base, *of_others), strict=True):
            if not counted.finite(tokens):
                raise no_number(stream.body, None)
        drafted: list[Any] = []
        for stream, tokens in zip(streams, (of_base, *of_others), strict=True):
            if stream.body.no_draft_head is not None:
                drafted.append(None)
                continue
            with closing(DiskStates(directory, loaded.lengths, hidden_size, stream="hidden-drafts")) as states:
                drafted.append(draft(stream, tokens.top1, states, progress))
    drawn = counted.drawn[documents.ALL]
    perplexity = figures.base_perplexity(of_base, counted)
    found = {
        body.name: result.CheckpointFigures(
            path=str(body.checkpoint.path),
            num_bytes=body.checkpoint.num_bytes,
            forms=body.forms,
            kv_cache="fp8" if body.kv_cache_fp8 else "bf16",
            groups=figures.group_figures(of_base, tokens, counted),
            kl_by_position=figures.by_position(tokens, counted),
            layers=errors[body.name],
            acceptance=figures.acceptance(held, drafted[0], drawn) if held is not None else None,
            no_acceptance=body.no_draft_head,
            disjointness=disjoint[body.name],
        )
        for body, tokens, held in zip(others, of_others, drafted[1:], strict=True)
    }
    return result.EvalResult(
        base=result.BaseFigures(
            path=str(source.checkpoint.path),
            num_bytes=source.checkpoint.num_bytes,
            perplexity=perplexity,
            acceptance=figures.acceptance(drafted[0], None, drawn) if drafted[0] is not None else None,
            no_acceptance=source.no_draft_head,
        ),
        checkpoints=found,
        pairs=figures.pairs(of_base, dict(zip(found, of_others, strict=True)), counted),
        data=loaded.sizes(),
        settings={
            "sha256": loaded.sha256(), "max_seq_len": max_seq_len, "num_truncated": loaded.num_truncated, "kv_cache": kv_cache,
            "resamples": resamples, "seed": seed, "device": str(chosen),
        },
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak_memory_bytes(),
    )  # fmt: skip


def refuse_small_disk(folder: Path, loaded: "Documents", hidden_size: int, num_others: int) -> None:
    """Three boundaries, embeddings of each stream, and what a layer adds: BF16 states of all tokens each."""
    if not folder.is_dir():
        raise InputError(f"--scratch {folder}: no such directory")
    needed = 2 * loaded.num_tokens * hidden_size * (6 + 4 * (1 + num_others)) + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{folder}: the hidden states need {human_bytes(needed)}, {human_bytes(free)} are free; name another place with --scratch DIR, "
            "or fewer documents with --limit"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="finished checkpoints: directories or Hub ids")
    parser.add_argument("--base", metavar="SRC", help="the BF16 checkpoint that they were made from; needed but with --tasks")
    parser.add_argument(
        "--data", action="append", default=[], metavar="FILE.jsonl",
        help='documents to measure on, in the format of --calibration; "builtin" (the default) for the sets that ship with mtpress; '
        "repeatable, and then reported one by one too",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="FILE.jsonl",
        help="what a checkpoint was calibrated on, to check that no document is in it; the built-in set is always checked; repeatable",
    )  # fmt: skip
    parser.add_argument("--max-seq-len", type=int, default=MAX_SEQ_LEN, metavar="N", help="cut texts at N tokens (default %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of each set; with --tasks, questions of each task")
    parser.add_argument(
        "--kv-cache", choices=("auto", "bf16", "fp8"), default="auto", help="auto: FP8 keys and values where a checkpoint declares them"
    )
    parser.add_argument("--resamples", type=int, default=RESAMPLES, metavar="N", help="draws of the bootstrap (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default %(default)s)")
    parser.add_argument("--scratch", metavar="DIR", help="where hidden states wait (default: the system's place for temporary files)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the layers run")
    parser.add_argument("--markdown", metavar="FILE", help="write the tables there too")
    parser.add_argument("--plots", metavar="DIR", help="draw KL by position, error by layer and size against KL there, as SVG")
    task_command.add_arguments(parser)
    take_engine_arguments(parser)


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json). 1: a document is in a calibration set."""
    refuse_range(options, {"max_seq_len": 2, "limit": 1, "resamples": 2})
    for path in filter(None, (options.markdown, options.plots, options.lm_eval_results)):
        if not Path(path).absolute().parent.is_dir():
            raise InputError(f"{path}: the directory to write it to does not exist")
    if options.tasks is not None:
        return task_command.run(options)
    task_command.refuse_without_tasks(options)
    if options.base is None:
        raise InputError("name the BF16 checkpoint that they were made from with --base, or --tasks to ask without one")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: must not be negative")
    if options.plots is not None:
        from mtpress.bench.chart import require_matplotlib

        require_matplotlib()
    result = evaluate(
        options.checkpoints, options.base, options.data, calibration=options.calibration, max_seq_len=options.max_seq_len,
        limit=options.limit, kv_cache=options.kv_cache, resamples=options.resamples, seed=options.seed, scratch=options.scratch,
        device=options.device, silent=options.json,
    )  # fmt: skip
    write(result, options.markdown, options.plots)
    if not options.json:
        show(result)
    return int(result.num_shared > 0), result.as_json()


def write(result: "EvalResult", markdown: str | None, plots: str | None) -> None:
    """The files that were asked for; InputError where one cannot be written."""
    from mtpress.evaluation.result import markdown as as_markdown

    if markdown is not None:
        write_text(Path(markdown), as_markdown(result))
    if plots is not None:
        from mtpress.evaluation.plots import draw

        try:
            Path(plots).mkdir(exist_ok=True)
            draw(result, Path(plots))
        except OSError as error:
            raise InputError(f"{error.filename or plots}: cannot be written ({error.strerror or error})") from None


def show(result: "EvalResult") -> None:
    """The result as tables on stdout."""
    from rich import box
    from rich.table import Table

    from mtpress.evaluation import result as tables
    from mtpress.evaluation.documents import ALL

    console = terminal.console()
    for group in result.base.perplexity:
        one = next(iter(result.checkpoints.values())).groups[group]
        table = Table(title=f"{group}: {one.num_documents} documents, {one.num_tokens:,} predictions", box=box.SIMPLE_HEAD)
        for number, heading in enumerate(tables.BRIEF_HEADINGS):
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        for row in tables.brief_rows(result, group):
            table.add_row(*row)
        console.print(table)
    for name, *cells in tables.acceptance_rows(result):
        console.print(f"drafts accepted, %: {name}: {'  '.join(cells)}", soft_wrap=True)
    for group, which, ratio, points in tables.pair_rows(result, ALL):
        console.print(f"{group}: KL of {which} = {ratio}; top-1 {points} points", soft_wrap=True)
    for name, found in result.checkpoints.items():
        table = Table(title=f"error by layer, %: {name}", box=box.SIMPLE_HEAD)
        for heading in ("layer", "mixer", "mixer error", "MLP error", "layer error", "accumulated"):
            table.add_column(heading, justify="left" if heading == "mixer" else "right")
        for row in tables.layer_rows(found):
            table.add_row(*row)
        console.print(table)
        console.print(f"{name}: {found.disjointness.said}", soft_wrap=True)
    console.print(f"{result.seconds:.1f} s, peak memory {human_bytes(result.peak_memory_bytes)}")
