"""check: a finished checkpoint → what is wrong with it, why it matters, and what to do.

In: a checkpoint, quantized or BF16; with --base its source, with --hashes its own record, with --engine a vLLM. Out: a
`CheckResult`, and with --engine an entry in mtpress.json. Leaves out: the rules themselves (rules/), and asking the engine
(engine/trial/trial.py). Without --base and --values no weight is read and torch is not imported: headers, small files and float32 scalars
decide. The verdict says what was not looked at.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpress import terminal
from mtpress.checkpoint.checkpoint import Checkpoint, resolve
from mtpress.checkpoint.record import RECORD_NAME, add_to_record
from mtpress.comparison.relation import Kind, add_base_is, refuse_alone
from mtpress.comparison.scale_bounds import ScaleBounds, scale_bounds
from mtpress.comparison.weights import Comparison, compare
from mtpress.engine.trial.trial import ACCEPTANCE_FLOOR, NUM_DRAFTS, Run, Trial
from mtpress.errors import InputError
from mtpress.progress import Progress, human_bytes
from mtpress.quant_config.stored import INPUT_GLOBAL_SCALE, INPUT_SCALE, KV_SCALES
from mtpress.quant_config.view import TEXT_ONLY_FLAG, Subject, stripped
from mtpress.rules.hashes import hash_files
from mtpress.rules.registry import BASE_RULES, BOUND_RULES, ENGINE_RULES, HASH_RULES, OPEN_RULES, VALUE_RULES, static_rules
from mtpress.rules.rule import Finding, Severity, apply
from mtpress.terminal import count

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}
SHOWN_NAMES = 3
ACTIVATION_SCALES = (INPUT_SCALE, INPUT_GLOBAL_SCALE, *KV_SCALES)


@dataclass(frozen=True)
class CheckResult:
    """What check found. format: of the checkpoint, in words; engine_flags: without which it must not be served; not_looked_at: what
    the verdict does not cover, each with the option that does."""

    checkpoint: str
    format: str
    num_tensors: int
    num_bytes: int
    num_quantized: int
    num_rules: int
    findings: tuple[Finding, ...]
    engine_flags: tuple[str, ...] = ()
    comparison: Comparison | None = None
    num_files_hashed: int | None = None
    num_values_bytes: int | None = None
    trial: Trial | None = None
    recorded: bool = False
    not_looked_at: tuple[str, ...] = ()
    seconds: float = 0.0

    def num(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def sound(self) -> bool:
        """No error; warnings and notes are allowed."""
        return self.num("error") == 0

    def as_json(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "sound": self.sound,
            "format": self.format,
            "num_tensors": self.num_tensors,
            "num_bytes": self.num_bytes,
            "num_quantized": self.num_quantized,
            "num_rules": self.num_rules,
            "num_findings": {severity: self.num(severity) for severity in SEVERITIES},
            "findings": [finding.as_json() for finding in self.findings],
            "engine_flags": self.engine_flags,
            "base_relation": self.comparison.relation.as_json() if self.comparison and self.comparison.relation else None,
            "comparison": self.comparison.as_json() if self.comparison else None,
            "num_files_hashed": self.num_files_hashed,
            "num_values_bytes": self.num_values_bytes,
            "not_looked_at": self.not_looked_at,
            "engine": self.trial.as_json() if self.trial else None,
            "recorded": self.recorded,
            "seconds": round(self.seconds, 3),
        }


def check(
    path: str | Path,
    base: str | Path | None = None,
    hashes: bool = False,
    silent: bool = False,
    *,
    values: bool = False,
    base_is: Kind | None = None,
    engine: str | None = None,
    num_drafts: int = NUM_DRAFTS,
    acceptance_floor: float = ACCEPTANCE_FLOOR,
    logs: Path | None = None,
) -> CheckResult:
    """Checks a checkpoint; with `base` its weights against it, with `values` its numbers by themselves, with `hashes` its files against
    mtpress.json, with `engine` what a vLLM makes of it ("" is the one that find_engine finds).

    base_is: what the base is to the checkpoint, in place of what the weights say; logs: where the engine's logs go.
    Raises InputError where there is no checkpoint of a known family to check, no record to hash by, or no engine, and
    ResourceError where the machine cannot serve it; whatever is wrong with the checkpoint itself is a finding.
    """
    started = time.perf_counter()
    where = resolve(path)
    if not (where / "config.json").is_file():
        raise InputError(f"{where}: no config.json; name the directory of a whole checkpoint")
    try:
        checkpoint = Checkpoint.open(where)
    except InputError as error:
        return CheckResult(str(where), "unreadable", 0, 0, 0, len(OPEN_RULES), tuple(apply(OPEN_RULES, error)))
    source = Checkpoint.open(base) if base is not None else None
    subject = Subject(checkpoint)
    rules = static_rules(subject)
    findings = list(apply(rules, subject))
    num_rules = len(OPEN_RULES) + len(rules)
    comparison = num_files_hashed = num_values_bytes = bounds = None
    if source is not None:
        comparison = compare(subject, source, given=base_is, silent=silent)
        findings += apply(BASE_RULES, comparison)
        num_rules += len(BASE_RULES)
    if values:
        from mtpress.values.survey import survey

        surveyed = survey(subject, silent=silent)
        num_values_bytes = surveyed.num_bytes
        findings += apply(VALUE_RULES, surveyed)
        num_rules += len(VALUE_RULES)
    if source is not None or values:
        bounds = scale_bounds(subject, source if comparison is not None and comparison.kind != "stranger" else None)
        findings += apply(BOUND_RULES, bounds)
        num_rules += len(BOUND_RULES)
    if hashes:
        hashed = hash_files(where, silent=silent)
        num_files_hashed = len(hashed.equal) + len(hashed.changed)
        findings += apply(HASH_RULES, hashed)
        num_rules += len(HASH_RULES)
    trial = None
    if engine is not None:
        trial = try_engine(where, source, engine, num_drafts, acceptance_floor, logs, silent)
        findings += apply(ENGINE_RULES, trial)
        num_rules += len(ENGINE_RULES)
    errors = [finding.as_json() for finding in findings if finding.severity == "error"]
    recorded = trial is not None and add_to_record(where, engine_check={"sound": not errors, "errors": errors, **trial.as_json()})
    return CheckResult(
        checkpoint=str(where),
        format=subject.declared.title if subject.declared else "quantized, undeclared" if subject.quantized else "BF16",
        num_tensors=len(checkpoint.tensors),
        num_bytes=checkpoint.num_bytes,
        num_quantized=len(subject.quantized),
        num_rules=num_rules,
        findings=tuple(findings),
        engine_flags=(TEXT_ONLY_FLAG,) if stripped(subject) else (),
        comparison=comparison,
        num_files_hashed=num_files_hashed,
        num_values_bytes=num_values_bytes,
        trial=trial,
        recorded=recorded,
        not_looked_at=tuple(unseen(subject, comparison, bounds, values, hashes, trial)),
        seconds=time.perf_counter() - started,
    )


def unseen(
    subject: Subject, comparison: Comparison | None, bounds: ScaleBounds | None, values: bool, hashes: bool, trial: Trial | None
) -> Iterator[str]:
    """What a verdict does not cover."""
    if comparison is None or comparison.kind == "stranger":
        yield "weights not compared (--base)" if values else "weights not read (--values, --base)"
    elif comparison.kind == "ancestor" and not values:
        yield "changed weights not judged (--values)"
    if bounds is None and any(name.rpartition(".")[2] in ACTIVATION_SCALES for name in subject.scalars):
        yield "scales of activations not judged"
    elif bounds is not None and bounds.unbounded:
        yield f"{count(len(bounds.unbounded), 'scale')} of activations not judged"
    if not hashes and subject.has(RECORD_NAME):
        yield "files not hashed (--hashes)"
    if trial is None:
        yield "not started in an engine (--engine)"


def try_engine(
    where: Path, source: Checkpoint | None, named: str, num_drafts: int, acceptance_floor: float, logs: Path | None, silent: bool
) -> Trial:
    """What the engine does with the checkpoint. InputError for no engine, ResourceError where it cannot fit on this machine."""
    from mtpress.engine.launch.installed import find_engine
    from mtpress.engine.memory.hardware import read_hardware
    from mtpress.engine.memory.served_model import ServedModel
    from mtpress.engine.trial.trial import examine

    folder = logs or Path(tempfile.mkdtemp(prefix="mtpress-check-"))
    folder.mkdir(parents=True, exist_ok=True)
    with Progress("check", 0, silent=silent) as progress:
        return examine(
            ServedModel.read(where),
            find_engine(named or None),
            read_hardware(),
            folder,
            base=ServedModel.read(source.path) if source is not None else None,
            num_drafts=num_drafts,
            acceptance_floor=acceptance_floor,
            say=progress.say,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint to check: a directory or a Hub id")
    parser.add_argument("--base", metavar="SRC", help="what it was made from: compare every weight with it (reads both whole)")
    add_base_is(parser)
    parser.add_argument(
        "--values", action="store_true", help="read every weight and say where the numbers are not those of a trained model"
    )
    parser.add_argument("--hashes", action="store_true", help="compare every file with the SHA-256 that mtpress.json recorded")
    parser.add_argument(
        "--engine",
        nargs="?",
        const="",
        metavar="PATH",
        help="start vLLM on it and ask: loads, text, pictures, tool calls, drafts accepted, same text with and without drafts; "
        "with --base also acceptance and logits against the base. PATH: a vLLM's environment, if not the one found",
    )
    parser.add_argument("--mtp", type=int, default=NUM_DRAFTS, metavar="N", help="with --engine: drafted tokens (default %(default)s)")
    parser.add_argument(
        "--acceptance-floor",
        type=float,
        default=ACCEPTANCE_FLOOR,
        metavar="SHARE",
        help="with --engine: the least share of first drafted tokens accepted (default %(default)s)",
    )
    parser.add_argument(
        "--engine-logs", type=Path, metavar="DIR", help="with --engine: where its logs go (default: a new temporary directory)"
    )


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json)."""
    refuse_alone(options)
    if options.mtp < 1:
        raise InputError(f"--mtp {options.mtp}: the draft head is tried with at least 1 token")
    if not 0 <= options.acceptance_floor <= 1:
        raise InputError(f"--acceptance-floor {options.acceptance_floor}: a share, from 0 to 1")
    result = check(
        options.checkpoint, options.base, options.hashes, silent=options.json, values=options.values, base_is=options.base_is,
        engine=options.engine, num_drafts=options.mtp, acceptance_floor=options.acceptance_floor, logs=options.engine_logs,
    )  # fmt: skip
    if not options.json:
        show(result)
    return (0 if result.sound else 1), result.as_json()


def show(result: CheckResult) -> None:
    """The result as a table and one line of verdict on stdout."""
    from rich.table import Table
    from rich.text import Text

    console = terminal.console()
    quantized = f", {count(result.num_quantized, 'module')} quantized" if result.num_quantized else ""
    console.print(
        f"{result.checkpoint}: {result.format}, {count(result.num_tensors, 'tensor')}, {human_bytes(result.num_bytes)}{quantized}",
        soft_wrap=True,
    )  # fmt: skip
    if result.findings:
        table = Table(show_lines=True)
        for heading in ("rule", "what is wrong", "what to do"):
            table.add_column(heading, overflow="fold")
        for finding in sorted(result.findings, key=lambda f: SEVERITIES.index(f.severity)):
            color = COLORS[finding.severity]
            label = Text.assemble((finding.severity, color), f"\n{finding.id}")
            table.add_row(label, with_names(finding), finding.remedy)
        console.print(table)
    if result.comparison is not None:
        if result.comparison.relation is not None:
            console.print(result.comparison.relation.line, soft_wrap=True)
        console.print(summary(result.comparison), soft_wrap=True)
    if result.num_values_bytes is not None:
        console.print(f"{human_bytes(result.num_values_bytes)} of numbers looked at", highlight=False)
    if result.num_files_hashed is not None:
        console.print(f"{count(result.num_files_hashed, 'file')} hashed")
    if result.trial is not None:
        for line in evidence(result.trial):
            console.print(line, soft_wrap=True)
        said = f"written into {RECORD_NAME}" if result.recorded else f"no {RECORD_NAME} to write it into"
        console.print(f"engine logs: {result.trial.logs}; {said}", soft_wrap=True)
    console.print(verdict(result), soft_wrap=True)


def with_names(finding: Finding) -> str:
    """The message, and the first names it concerns."""
    shown = [name for name in finding.where[:SHOWN_NAMES] if name not in finding.message]
    more = len(finding.where) - len(finding.where[:SHOWN_NAMES])
    return "\n".join([finding.message, *shown, *([f"… and {more} more (--json lists them)"] if more else [])])


def summary(comparison: Comparison) -> str:
    said = f"{count(comparison.num_equal, 'tensor')} equal to the base bit for bit"
    said += f", {comparison.num_rounded} when rounded" if comparison.num_rounded else ""
    numbers = comparison.as_json()
    if not numbers["num_quantized"]:
        return said
    median, largest = numbers["median_error"], numbers["largest_error"]
    return f"{said}; {numbers['num_quantized']} quantized, ‖w − ŵ‖/‖w‖ median {median:.4f}, largest {largest:.4f}"


def evidence(trial: Trial) -> list[str]:
    """What the engine was seen to do, a line each."""
    runs = {"with drafts": trial.drafted, "without drafts": trial.plain, "base": trial.base}
    lines = [f"{trial.engine}: {what}: {told(run)}" for what, run in runs.items() if run is not None]
    if trial.num_stories_compared:
        same = trial.num_stories_compared - len(trial.differences)
        widest = max((difference.margin for difference in trial.differences), default=0.0)
        ties = f"; the others part where the choices are within {widest:.2f} nat" if trial.differences else ""
        lines.append(f"greedy text is the same with and without drafts in {same} of {trial.num_stories_compared}{ties}")
    if trial.closeness is not None:
        seen = trial.closeness
        agreed = f"same first choice at {seen.top1_agreement:.1%} of {count(seen.num_tokens, 'token')}"
        lines.append(f"logits against the base: KL {seen.mean_kl:.4f} nat a token, {agreed}")
    return lines


def told(run: Run) -> str:
    """One start of the engine in a few words."""
    if run.refusal is not None:
        return f"refused: {run.refusal}"
    kinds = {"text": "text", "picture": "pictures", "tool": "tool calls"}
    said = ", ".join(f"{name} {run.num_right(kind)}/{run.num_asked(kind)}" for kind, name in kinds.items() if run.num_asked(kind))
    counted = run.spec_decode
    if counted is None:
        return said or "loaded"
    shares = " / ".join(f"{share:.3f}" for share in counted.per_position)
    drafts = f"accepted {shares} of {counted.num_drafts} drafts, {counted.mean_accepted_length:.2f} tokens a step"
    return f"{said}; {drafts}" if said else drafts


def verdict(result: CheckResult) -> str:
    """The last line: sound or not, and by what."""
    numbers = Counter({severity: result.num(severity) for severity in SEVERITIES})
    said = ", ".join(count(number, severity) for severity, number in numbers.items() if number) or "nothing found"
    flags = f"; serve it with {' '.join(result.engine_flags)}" if result.engine_flags else ""
    unseen = f"; not looked at: {', '.join(result.not_looked_at)}" if result.not_looked_at else ""
    word = "sound" if result.sound else "NOT SOUND"
    return f"{word}: {said} by {count(result.num_rules, 'rule')} in {result.seconds:.2f} s{flags}{unseen}"
