"""quantize: a BF16 checkpoint and a recipe → a 4-bit checkpoint with its draft head whole.

In: a source directory or Hub id, a new output directory, a recipe. Out: the output directory and a `QuantizeResult`.
Leaves out: the decisions (recipe, plan) and the work (stream); this file only puts them in order and writes what
stands beside the weights.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mtpress import terminal
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.journal import difference
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.output_place import refuse_place
from mtpress.checkpoint.own_files import refuse_foreign_files
from mtpress.checkpoint.partial_directory import PartialDirectory
from mtpress.checkpoint.record import RECORD_NAME, peak_memory_bytes, record_bytes, versions
from mtpress.checkpoint.source_guard import SourceGuard
from mtpress.checkpoint.writer import CheckpointWriter, remove_journal
from mtpress.device import choose_device
from mtpress.errors import InputError
from mtpress.models.qwen3_5.names import COMPONENT_TITLES
from mtpress.plan.bf16_source import bf16_source
from mtpress.plan.budget import Choices, choices, chosen_recipe
from mtpress.plan.plan import LAYOUTS, Plan, make_plan
from mtpress.plan.recipe import Recipe, load_recipe, parse_recipe
from mtpress.progress import Progress, human_bytes
from mtpress.quantization.output_files import carried_files, chosen_files, config_files, sampling_of, template_choice, template_of
from mtpress.quantization.source_faults import notes as lacking
from mtpress.quantization.source_faults import refuse_faults
from mtpress.terminal import say

if TYPE_CHECKING:
    from mtpress.calibration.samples import CalibrationSet
    from mtpress.quantization import preflight
    from mtpress.quantization.worker_pool import Spread
FORMAT_TITLES = {"bf16": "BF16"} | {name: layout.title for name, layout in LAYOUTS.items()}
TEMPLATE_TITLES = {"mtpress": "mtpress's own", "source": "the source's", "none": "none, as in the source"}
SHOWN_NAMES = 3
MEASURED = ("calibration", "seconds", "peak_memory_bytes")  # entries of the record that the result repeats


@dataclass(frozen=True)
class QuantizeResult:
    """What quantize did, or (dry run) would do. Sizes in bytes, times in seconds. misfits: in BF16 because of their shape alone.
    rounded: whether the source was in another dtype.
    chat_template: mtpress, source or none. notes: what was said before it began. generation_config: the sampling in it.
    budget: what the recipe's can reach and, of a run, what was chosen (plan/budget.py); the plan of a dry run is
    then that of the smallest output."""

    out: str
    recipe: str
    dry_run: bool
    source_bytes: int
    output_bytes: int
    bytes_by_component: dict[str, int]
    bytes_by_format: dict[str, dict[str, int]]
    shards: dict[str, int]
    num_quantized: int
    num_kept: int
    num_dropped: int
    ignore: tuple[str, ...]
    misfits: tuple[str, ...] = ()
    chat_template: str = "source"
    notes: Sequence[str] = ()
    rounded: bool = False
    generation_config: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] | None = None
    promised: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    seconds: dict[str, float] | None = None
    peak_memory_bytes: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe,
    *,
    calibration: Sequence[str] = (),
    device: str = "auto",
    dry_run: bool = False,
    resume: bool = False,
    workers: int = 1,
    ray: str | None = None,
    silent: bool = False,
) -> QuantizeResult:
    """Makes `out` from `source`. calibration: JSON-lines files, or names of sets that ship with mtpress; empty means what the recipe names.

    workers: processes to spread the samples (weight-only: the shards) over, on this machine or on the Ray cluster at `ray`;
    the bytes are the same for any number.
    resume: go on with what a stopped run of the same source, recipe and calibration left in OUT.partial, if there is any.
    Raises InputError before anything is written if source, recipe or calibration cannot work, ResourceError if the machine
    lacks disk or device. Nothing that looks finished stays behind.
    """
    from mtpress.quantization import (
        machine,
        preflight,  # torch from here on
    )
    from mtpress.quantization.resumption import refuse_damage
    from mtpress.quantization.rounders import kernel
    from mtpress.quantization.worker_pool import Spread, write_weights

    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    target = Path(out)
    refuse_place(target, [source], finished=resume)
    if chosen.rounding in ("signround", "gptq") and (workers > 1 or ray):
        raise InputError(
            f"recipe {chosen.name}: rounding {chosen.rounding} goes through all samples in one process; "
            "leave --workers and --ray out, or take rounding hessian"
        )
    checkpoint, reading = bf16_source(Checkpoint.open(source), chosen.dequantize)
    refuse_foreign_files(checkpoint.path)
    open_choice = choices(checkpoint, chosen) if chosen.budget is not None else None
    plan = open_choice.least if open_choice else make_plan(checkpoint, chosen)
    templated = template_choice(chosen, checkpoint)
    settled = chosen.model_copy(update={"chat_template": "mtpress" if templated.ours else "source"})
    carried = chosen_files(settled, checkpoint, carried_files(checkpoint))
    beside = {**carried, **config_files(plan)}
    refuse_faults(checkpoint, chosen)
    chat = {"chat_template": template_of(settled, beside), "generation_config": sampling_of(beside)}
    said: dict[str, Any] = {
        "notes": [note for note in (reading.note, *lacking(checkpoint, chosen), templated.note) if note],
        "rounded": bool(reading.rounded),
    }
    if not silent:
        for note in said["notes"]:
            say(f"quantize  {note}", to=sys.stderr)
    beside_bytes = sum(len(content) for content in beside.values())
    spread = Spread(source, workers, ray)
    device_used = choose_device(device)
    begun = machine.begin(plan, target)
    if dry_run:
        lengths = dry_lengths(checkpoint, settled, calibration)
        promised, _ = foresee(plan, begun, device_used, lengths, spread, (), beside_bytes, open_choice)
        reach = open_choice.range_record() if open_choice else None
        return describe(plan, target, dry_run=True, measured={"promised": promised.as_json(), **chat, **said, "budget": reach})
    guard = SourceGuard(checkpoint)
    calibrated = None
    if chosen.needs_samples:
        calibrated = samples_of(checkpoint, settled, calibration)
    made_from: dict[str, Any] = {
        "recipe": chosen.canonical(),
        "calibration": calibrated.record() if calibrated else without_samples(chosen),
    }
    if target.exists():
        record = finished_record(target, made_from, checkpoint)
        if open_choice:
            plan = make_plan(checkpoint, chosen_recipe(open_choice, [group["format"] for group in record["budget"]["groups"]]))
        return describe(plan, target, measured={key: record.get(key) for key in (*MEASURED, "budget")} | chat | said)
    for note in value_notes(checkpoint):
        said["notes"].append(note)
        if not silent:
            say(f"quantize  {note}", to=sys.stderr)
    identity: dict[str, Any] = {}
    if open_choice:
        assert calibrated is not None

        def ready(partial: Path) -> None:
            refuse_measuring(open_choice, begun, device_used, calibrated, partial, beside_bytes)

        plan, made_from["budget"] = settle_formats(open_choice, target, calibrated, device_used, ready, guard, resume, silent)
        beside = {**carried, **config_files(plan)}
        identity = {"budget": open_choice.budget}
    identity |= run_identity(plan, guard, calibrated, device_used)
    metadata = dict(checkpoint.shards[0].metadata) or {"format": "pt"}
    with (
        CheckpointWriter(target, plan.shards, metadata, run=identity, resume=resume, made_from=[checkpoint.path]) as writer,
        Progress("quantize", sum(step.effort(bool(calibrated)) for step in plan.steps), silent=silent) as progress,
    ):
        lengths = [len(sample.input_ids) for sample in calibrated.samples] if calibrated else []
        steps_done = frozenset(writer.finished)
        promised, loaded_bytes = foresee(plan, begun, device_used, lengths, spread, steps_done, beside_bytes)
        preflight.refuse(plan, promised, lengths, writer.partial, loaded_bytes, device_used, workers)
        progress.say(f"needs {promised}")
        progress.skip(sum(step.effort(bool(calibrated)) for step in plan.steps if step.title in steps_done))
        started = time.perf_counter()
        if steps_done:
            refuse_damage(plan, writer, lengths, silent)
        written = write_weights(plan, writer, calibrated, device_used, guard, progress, spread)
        guard.look_closely()
        for name, content in beside.items():
            writer.write_file(name, content)
        took = preflight.Promise(
            memory_bytes=peak_memory_bytes() + sum(written.worker_memory),
            disk_bytes=writer.used_bytes(),
            seconds=time.perf_counter() - started,
        )
        entries: dict[str, Any] = {
            **made_from,
            "source": {
                "name": checkpoint.path.name if Path(source).is_dir() else str(source),
                "identity": checkpoint.identity,
                "files": guard.fingerprints(),
                "quantized_sample_sha256": quantized_sample_sha256(writer.sources),
            },
            "draft_head": draft_head(plan),
            "rounded_to_bf16": dict(reading.rounded),
            **chat,
            "source_template": templated.record(),
            **said,
            "device": str(device_used),
            "kernel": kernel(plan, device_used),
            "seconds": {kind: round(value, 3) for kind, value in {**written.seconds, "total": took.seconds}.items()},
            "peak_memory_bytes": took.memory_bytes,
            "preflight": {"promised": promised.as_json(), "took": took.as_json()},
            "bytes_by_component": plan.bytes_by_component,
            "output_sha256": dict(sorted(writer.sha256.items())),
        }
        if written.worker_memory:
            memory = written.worker_memory
            entries["workers"] = {"count": len(memory), "ray": ray is not None, "peak_memory_bytes": memory}
        if written.losses:
            entries["losses"] = {str(layer): losses for layer, losses in sorted(written.losses.items())}
        if plan.misfits:
            entries["misfits"] = list(plan.misfits)
        if steps_done:
            entries["resumed"] = {"steps_before": len(steps_done)}
        writer.write_file(RECORD_NAME, record_bytes("quantize", **entries))
        writer.finish()
    measured = {"promised": promised.as_json(), **chat, **said, "budget": entries.get("budget")} | {key: entries[key] for key in MEASURED}
    return describe(plan, target, measured=measured)


def value_notes(checkpoint: Checkpoint) -> list[str]:
    """Where the source's numbers are not those of a trained model, by some rows of every tensor: known before the work begins."""
    from mtpress.quant_config.view import Subject
    from mtpress.rules.rule import apply
    from mtpress.rules.values import RULES, not_read
    from mtpress.values.survey import survey

    rules = [rule for rule in RULES if rule.find is not not_read]
    notes = []
    for finding in apply(rules, survey(Subject(checkpoint), sample=True, silent=True)):
        names = [name for name in finding.where[:SHOWN_NAMES] if name not in finding.message]
        more = ", …" if len(finding.where) > SHOWN_NAMES else ""
        said = f" ({', '.join(names)}{more})" if names else ""
        notes.append(f"{finding.message}{said}: mtpress check SRC --values says more")
    return notes


def settle_formats(
    open_choice: Choices,
    target: Path,
    calibrated: "CalibrationSet",
    device: Any,
    ready: Callable[[Path], None],
    guard: SourceGuard,
    resume: bool,
    silent: bool,
) -> tuple[Plan, dict[str, Any]]:
    """The plan of the formats that a byte budget leaves, by measuring what each loses; and what the record says of the choice."""
    from mtpress.quantization.sensitivity import settle

    least = open_choice.least
    made_of = {"candidates": list(open_choice.plans), **run_identity(least, guard, calibrated, device)}
    formats, said = settle(open_choice, PartialDirectory(target), made_of, calibrated.samples, device, ready, guard, resume, silent)
    return make_plan(least.source, chosen_recipe(open_choice, formats)), said


def refuse_measuring(
    open_choice: Choices, begun: "Future[dict[str, float]]", device: Any, calibrated: "CalibrationSet", partial: Path, beside_bytes: int
) -> None:
    """ResourceError where the machine cannot measure, or the disk cannot hold an output of the budget."""
    from mtpress.quantization import preflight
    from mtpress.quantization.worker_pool import Spread

    least, lengths = open_choice.least, [len(sample.input_ids) for sample in calibrated.samples]
    promised, loaded_bytes = foresee(least, begun, device, lengths, Spread(least.source.path), (), beside_bytes, open_choice)
    preflight.refuse(least, promised, lengths, partial, loaded_bytes, device)


def draft_head(plan: Plan) -> str:
    """What became of the draft head, in words."""
    kept = [info for job in plan.jobs if job.component == "mtp" for info in job.sources]
    if not kept:
        return "none in the source"
    return "rounded to BF16 from the source" if any(info.stored for info in kept) else "verbatim from the source"


def without_samples(recipe: Recipe) -> dict[str, Any] | None:
    """What the record says in place of the samples."""
    return {"constant_input_scale": recipe.constant_input_scale} if recipe.constant_input_scale else None


def dry_lengths(checkpoint: Checkpoint, recipe: Recipe, calibration: Sequence[str]) -> list[int]:
    """Tokens of each sample; of a Hub data set, which a dry run does not fetch, as many as the recipe allows."""
    from mtpress.calibration.samples import BUILTIN_SETS

    if not recipe.needs_samples:
        return []
    sources = recipe.calibration_sources
    if not calibration and any(source.dataset not in BUILTIN_SETS for source in sources):
        return [source.max_seq_len for source in sources for _ in range(source.num_samples)]
    return [len(sample.input_ids) for sample in samples_of(checkpoint, recipe, calibration).samples]


def samples_of(checkpoint: Checkpoint, recipe: Recipe, calibration: Sequence[str]) -> "CalibrationSet":
    """The calibration samples, rendered by the template that the output gets."""
    from mtpress.calibration.samples import load_calibration
    from mtpress.chat.template import template

    return load_calibration(checkpoint.path, recipe.calibration, calibration, template() if recipe.chat_template == "mtpress" else None)


def foresee(
    plan: Plan,
    begun: "Future[dict[str, float]]",
    device: Any,
    lengths: Sequence[int],
    spread: "Spread",
    steps_done: Collection[str] = (),
    beside_bytes: int = 0,
    open_choice: Choices | None = None,
) -> "tuple[preflight.Promise, int]":
    """What the run will take, and the memory that this process has loaded by now, in bytes. open_choice: formats that are still to be
    measured, from the plan of the smallest output."""
    from mtpress.quantization import machine, preflight

    if lengths:
        import mtpress.calibration.forward  # noqa: F401  what it loads counts as loaded
    rates = machine.measure(plan, begun, device, lengths)
    loaded_bytes = psutil.Process().memory_info().rss
    promised = preflight.promise(
        plan, rates, lengths, loaded_bytes, beside_bytes=beside_bytes, steps_done=steps_done, workers=spread.workers
    )
    if open_choice is not None:
        promised = preflight.with_measuring(promised, open_choice, rates, lengths)
    return promised, loaded_bytes


def finished_record(out: Path, made_from: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The record of an output that --resume finds finished; InputError that names what it was made of, if that differs."""
    record = read_json_object(out / RECORD_NAME) if (out / RECORD_NAME).exists() else {}
    old = {"recipe": record.get("recipe"), "calibration": record.get("calibration"), "source": record.get("source", {}).get("identity")}
    different = difference(old, json.loads(json.dumps({**made_from, "source": checkpoint.identity})))
    if different:
        raise InputError(f"{out}: exists already and was made with {different}; name a directory that does not")
    remove_journal(out)
    return record


def run_identity(plan: Plan, guard: SourceGuard, calibrated: Any, device: Any) -> dict[str, Any]:
    """What the bytes of the output depend on: two runs with equal values write equal weights."""
    packages = ("mtpress", "torch", "transformers", "tokenizers") if calibrated else ("mtpress", "torch")
    identity = {
        "recipe": plan.recipe.canonical(),
        "source": guard.fingerprints(),
        "config": plan.source.identity,
        "calibration": calibrated.record() if calibrated else None,
        "versions": {name: version for name, version in versions().items() if name in packages},
        "shards": {file: sum(tensor.num_bytes for tensor in tensors) for file, tensors in plan.shards.items()},
    }
    return {**identity, "device": device.type} if calibrated else identity


def quantized_sample_sha256(digests: Mapping[str, str]) -> str:
    """One SHA-256 for all stored matrices that were quantized: of a line "name digest" for each, in order of name.

    A digest is of a matrix's beginning and end (prefetch.sample_digest). With it and the output, which holds every other tensor bit for
    bit, the record says which weights the source had: a fine-tune has the same headers as its ancestor.
    """
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(digests.items())).encode()).hexdigest()


def describe(plan: Plan, target: Path, dry_run: bool = False, measured: Mapping[str, Any] | None = None) -> QuantizeResult:
    """The plan in numbers, and what is known of a run."""
    kinds = [job.kind for job in plan.jobs for _ in job.sources]
    return QuantizeResult(
        out=str(target),
        recipe=plan.recipe.name,
        dry_run=dry_run,
        source_bytes=plan.source.num_bytes,
        output_bytes=plan.output_bytes,
        bytes_by_component=plan.bytes_by_component,
        bytes_by_format=plan.bytes_by_format,
        shards={name: sum(t.num_bytes for t in tensors) for name, tensors in plan.shards.items()},
        num_quantized=kinds.count("quantize"),
        num_kept=kinds.count("keep"),
        num_dropped=kinds.count("drop"),
        ignore=plan.ignore,
        misfits=plan.misfits,
        **(measured or {}),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="the BF16 checkpoint: a directory or a Hub id")
    parser.add_argument("out", metavar="OUT", help="the directory to make; it must not exist")
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="a shipped recipe (see `mtpress recipes`) or a YAML file")
    parser.add_argument(
        "--calibration", action="append", default=[], metavar="FILE.jsonl",
        help="samples to use in place of the data sets of the recipe; builtin, builtin-images or builtin-mixed for those that ship with "
        "mtpress; repeatable",
    )  # fmt: skip
    parser.add_argument("--weight-only", type=float, metavar="SCALE", help="no calibration: this input_scale for every linear")
    parser.add_argument(
        "--chat-template", choices=("source", "mtpress", "replace"),
        help="in place of the recipe's: source; mtpress, unless the source's is its author's own; replace: mtpress's in any case",
    )  # fmt: skip
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the forward and the packing run")
    parser.add_argument("--dequantize", action="store_true", help="make BF16 of a source in block-FP8 (weight_scale_inv) first")
    parser.add_argument("--resume", action="store_true", help="go on where the same command was stopped")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="spread the samples (weight-only: the shards) over N processes")
    parser.add_argument(
        "--ray", nargs="?", const="auto", metavar="ADDRESS",
        help='put the workers on a Ray cluster that sees SRC and OUT: an address, "auto" (the default), or "local" for one of this machine',
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="validate, print the plan, write nothing")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json)."""
    recipe = load_recipe(options.recipe)
    if options.weight_only is not None:
        if not 0 < options.weight_only <= 1e4:
            raise InputError(
                f"--weight-only {options.weight_only}: an input_scale must be positive; 1/2688 times the largest activation is usual"
            )
        recipe = parse_recipe({**recipe.canonical(), "constant_input_scale": options.weight_only}, f"--weight-only, recipe {recipe.name}")
    said = {"chat_template": options.chat_template, "dequantize": options.dequantize or None}
    recipe = recipe.model_copy(update={key: value for key, value in said.items() if value is not None})
    if not 1 <= options.workers <= 1024:
        raise InputError(f"--workers {options.workers}: from 1 to 1024")
    result = quantize(
        options.source, options.out, recipe, calibration=options.calibration, device=options.device, dry_run=options.dry_run,
        resume=options.resume, workers=options.workers, ray=options.ray, silent=options.json,
    )  # fmt: skip
    if not options.json:
        show(result)
    return 0, result.as_json()


def show(result: QuantizeResult) -> None:
    """The result as tables on stdout."""
    from rich.table import Table

    console = terminal.console()
    verb = "would write" if result.dry_run else "wrote"
    table = Table(title=f"{result.recipe}: {verb} {result.out}")
    for heading, side in (("component", "left"), ("bytes", "right"), ("of it", "left")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for part, size in result.bytes_by_component.items():
        formats = sorted(result.bytes_by_format[part].items(), key=lambda item: -item[1])
        shares = [f"{human_bytes(held)} {FORMAT_TITLES[name]}" for name, held in formats]
        table.add_row(COMPONENT_TITLES.get(part, part), human_bytes(size), ", ".join(shares))
    if "mtp" not in result.bytes_by_component:
        table.add_row(COMPONENT_TITLES["mtp"], "none", "without draft head: mtpress graft")
    table.add_row(
        "all",
        f"{human_bytes(result.output_bytes)} ({result.output_bytes / result.source_bytes:.2f}× of {human_bytes(result.source_bytes)})",
    )
    console.print(table)
    how = "as BF16" if result.rounded else "bit for bit"
    console.print(f"{result.num_quantized} matrices quantized, {result.num_kept} tensors kept {how}, {result.num_dropped} dropped")
    for note in result.notes:
        console.print(note)
    console.print(f"files: {', '.join(f'{name} ({human_bytes(size)})' for name, size in result.shards.items())}")
    sampling = ", ".join(f"{key} {value}" for key, value in result.generation_config.items() if key != "do_sample")
    console.print(f"chat template: {TEMPLATE_TITLES[result.chat_template]}; sampling: {sampling or 'what the engine does by itself'}")
    if result.budget is not None:
        show_budget(console, result.budget)
    if result.dry_run:
        from mtpress.quantization import preflight

        console.print(f"would take {preflight.Promise(**result.promised or {})}")
        console.print(f"kept in BF16 and named in both config files: {len(result.ignore)} modules (--json lists them)")
    if result.misfits:
        console.print(f"kept in BF16 because N or K of their fused group does not fit: {', '.join(result.misfits)}")
    if result.seconds and result.peak_memory_bytes:
        spent = ", ".join(f"{kind} {value:.1f} s" for kind, value in result.seconds.items())
        console.print(f"{spent}; peak memory {human_bytes(result.peak_memory_bytes)}")


def show_budget(console: Any, budget: Mapping[str, Any]) -> None:
    """What can be reached, or what was chosen: the format of each fused linear by layer, and what it loses there."""
    from rich.table import Table

    reach = f"from {human_bytes(budget['least_bytes'])} to {human_bytes(budget['most_bytes'])}"
    if "groups" not in budget:
        console.print(
            f"budget {human_bytes(budget['bytes'])}: outputs {reach} can be reached, the smallest is shown; the formats need a pass over "
            "the samples, which a dry run leaves out"
        )
        return
    table = Table(title="formats chosen, by layer: relative error of the layer's output in each")
    for heading in ("linear", "format", *budget["groups"][0]["error"]):
        table.add_column(heading)
    for group in budget["groups"]:
        table.add_row(group["linear"], FORMAT_TITLES[group["format"]], *(f"{error:.2e}" for error in group["error"].values()))
    console.print(table)
    console.print(
        f"budget {human_bytes(budget['bytes'])}: {human_bytes(budget['chosen_bytes'])} chosen, {budget['bits_per_weight']} bits a weight, "
        f"{reach} can be reached"
    )
