"""repair: a finished checkpoint with faults → a new one without those that can be mended without loss.

In: a checkpoint, a new output directory and, for what only the source has, its BF16 base. Out: the output directory and a
`RepairResult`: for each finding of check how it was mended, or why it is left and what it would take. Leaves out: the repairs
themselves (repairs/), the rules (rules/) and writing (revision.py). The source is never opened for writing; what does not change is
hard-linked, and where only metadata is wrong no weight is read.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtpress import terminal
from mtpress.checkpoint import Checkpoint, resolve
from mtpress.comparison import compare
from mtpress.errors import InputError
from mtpress.progress import human_bytes
from mtpress.repairs.base_files import open_base
from mtpress.repairs.mending import Outcome, compared, find, mend_all, mend_reindexed
from mtpress.repairs.opening import open_broken
from mtpress.repairs.overlay import Overlay
from mtpress.repairs.repair import Context, Left
from mtpress.revision import Revision, RevisionPlan
from mtpress.rules.base import RULES as WEIGHT_RULES
from mtpress.rules.registry import STATIC_RULES
from mtpress.rules.rule import Finding, Severity, apply, count
from mtpress.rules.subject import Subject

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class RepairResult:
    """What repair found and did. outcomes: in the order of work; findings: what check says of the output (dry run: would say).

    written: whether `out` was made. linked: files that stay; rewritten: shard → tensors, streamed anew; sizes in bytes.
    """

    checkpoint: str
    out: str
    dry_run: bool
    written: bool
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    compared: bool
    left_out: tuple[str, ...]
    plan: RevisionPlan | None
    seconds: float = 0.0

    @property
    def fixed(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.fixed)

    @property
    def left(self) -> tuple[Outcome, ...]:
        return tuple(outcome for outcome in self.outcomes if outcome.left)

    def num(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def sound(self) -> bool:
        """No error in what was written or, where nothing was, in what is there."""
        return self.num("error") == 0

    def as_json(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "out": self.out,
            "dry_run": self.dry_run,
            "written": self.written,
            "sound": self.sound,
            "fixed": [outcome.as_json() for outcome in self.fixed],
            "left": [outcome.as_json() for outcome in self.left],
            "findings": [finding.as_json() for finding in self.findings],
            "compared_with_base": self.compared,
            "left_out": self.left_out,
            "files": {
                "linked": self.plan.linked,
                "rewritten": self.plan.rewritten,
                "added": self.plan.added,
                "written": self.plan.written,
                "bytes_written": self.plan.bytes_written,
                "bytes_linked": self.plan.bytes_linked,
            }
            if self.plan is not None
            else None,
            "seconds": round(self.seconds, 3),
        }


def repair(
    checkpoint: str | Path,
    out: str | Path,
    base: str | Path | None = None,
    *,
    comparing: bool = True,
    keep_template: bool = False,
    dry_run: bool = False,
    silent: bool = False,
) -> RepairResult:
    """Makes `out` from `checkpoint` with every finding mended that has a lossless repair; nothing to mend: nothing is written.

    base: the BF16 source, for what only it has; with `comparing` every weight is compared with it too, which reads both whole.
    keep_template: a chat template that fails stays, and is told as left. dry_run: says what would be done, reads no weight and writes
    nothing. InputError where nothing can be opened, or `out` exists; ResourceError where the disk is full. Errors that are left are no
    exception: RepairResult.sound says.
    """
    started = time.perf_counter()
    target = Path(out)
    if target.exists():
        raise InputError(f"{target}: exists already; name a directory that does not")
    if resolve(checkpoint).resolve() in target.resolve().parents:
        raise InputError(f"{target}: lies inside {checkpoint}, which is not to be changed; name a directory elsewhere")
    source = open_base(base, str(checkpoint)) if base is not None else None
    opened = open_broken(checkpoint, source)
    with Overlay(opened.stored, config_is_new=opened.config_is_new) as overlay:
        ctx = Context(overlay, source, may_read=not dry_run, left_out=opened.left_out, keep_template=keep_template)
        outcomes: list[Outcome] = [*mend_reindexed(ctx, opened.findings), *mend_all(ctx)]
        look = comparing and source is not None and not dry_run
        by_weight: list[Finding] = []
        if look:
            comparison = compared(ctx, silent)
            by_weight = list(apply(WEIGHT_RULES, comparison))
            outcomes = [*(o for o in outcomes if not o.left), *mend_all(replace(ctx, comparison=comparison), tuple(by_weight))]
        plan = None
        findings = find(ctx)
        written = any(outcome.fixed for outcome in outcomes)
        if written:
            revision = Revision(opened.stored)
            overlay.put_into(revision)
            plan = revision.plan()
            if not dry_run:
                entries = recorded(source, opened.findings, by_weight, outcomes, opened.left_out)
                revision.write(target, "repair", entries, silent=silent)
                findings = judged(target, overlay, source if look else None)
        final = {finding.id for finding in findings} | {finding.id for finding in by_weight}
        outcomes = [outcome for outcome in outcomes if outcome.fixed or outcome.finding.id in final]  # others went with a later repair
        mended = {outcome.finding.id for outcome in outcomes if outcome.fixed and not outcome.left}
        findings += [finding for finding in by_weight if finding.id not in mended]
        told_of = {outcome.finding.id for outcome in outcomes if outcome.left}
        outcomes += [Outcome(f, left=(Left("it shows in what was written", f.remedy),)) for f in findings if f.id not in told_of]
    return RepairResult(
        checkpoint=str(opened.stored.path),
        out=str(target),
        dry_run=dry_run,
        written=written and not dry_run,
        outcomes=tuple(outcomes),
        findings=tuple(findings),
        compared=look,
        left_out=tuple(f"{name}: {why}" for name, why in opened.left_out.items()),
        plan=plan,
        seconds=time.perf_counter() - started,
    )


def judged(out: Path, overlay: Overlay, base: Checkpoint | None) -> list[Finding]:
    """What check says of what was written; with a base, also of the tensors that were changed, held against it."""
    made = Checkpoint.open(out)
    findings = list(apply(STATIC_RULES, Subject(made)))
    if base is not None:
        changed = {name: made.tensors[name] for name in overlay.new_tensors}
        whole = {name: info for name, info in made.tensors.items() if name.rpartition(".")[0] in {n.rpartition(".")[0] for n in changed}}
        errors = [rule for rule in WEIGHT_RULES if rule.severity == "error"]
        findings += apply(errors, compare(Subject(replace(made, tensors=whole)), base, silent=True))
    return findings


def recorded(
    base: Checkpoint | None, findings: tuple[Finding, ...], by_weight: list[Finding], outcomes: list[Outcome], left_out: Any
) -> dict[str, Any]:
    """What mtpress.json keeps of a repair."""
    return {
        "base": {"name": base.path.resolve().name, "identity": base.identity} if base is not None else None,
        "findings": [finding.as_json() for finding in (*findings, *by_weight)],
        "repairs": [{"id": o.finding.id, "where": o.finding.where, "how": [fix.how for fix in o.fixed]} for o in outcomes if o.fixed],
        "left": [{"id": o.finding.id, "severity": o.finding.severity, "why": [left.why for left in o.left]} for o in outcomes if o.left],
        "left_out": dict(left_out),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint to repair: a directory or a Hub id; it is not changed")
    parser.add_argument("out", metavar="OUT", help="the directory to make; it must not exist")
    parser.add_argument("--base", metavar="SRC", help="its BF16 source, for what only that has")
    parser.add_argument(
        "--no-compare", action="store_true", help="with --base: take what is missing from it, without comparing every weight with it"
    )
    parser.add_argument("--keep-template", action="store_true", help="leave a chat template that fails as it is")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; read no weights, write nothing")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json)."""
    if options.no_compare and options.base is None:
        raise InputError("--no-compare: goes with --base SRC, without which nothing is compared")
    result = repair(
        options.checkpoint,
        options.out,
        options.base,
        comparing=not options.no_compare,
        keep_template=options.keep_template,
        dry_run=options.dry_run,
        silent=options.json,
    )
    if not options.json:
        show(result)
    return (0 if result.sound else 1), result.as_json()


def show(result: RepairResult) -> None:
    """The result as a table and one line of verdict on stdout."""
    from rich.table import Table
    from rich.text import Text

    console = terminal.console()
    if result.outcomes:
        table = Table(show_lines=True)
        for heading in ("finding", "what is wrong", "would be done" if result.dry_run else "what was done"):
            table.add_column(heading, overflow="fold")
        for outcome in result.outcomes:
            color = COLORS[outcome.finding.severity]
            label = Text.assemble((outcome.finding.severity, color), f"\n{outcome.finding.id}")
            table.add_row(label, outcome.finding.message, told(outcome))
        console.print(table)
    for line in result.left_out:
        console.print(f"not taken over: {line}", soft_wrap=True)
    if result.plan is not None:
        would = "would write" if result.dry_run else "wrote"
        console.print(
            f"{would} {human_bytes(result.plan.bytes_written)}, {human_bytes(result.plan.bytes_linked)} "
            f"{'would stay' if result.dry_run else 'stay'} as they are in {count(len(result.plan.linked), 'shard')}",
            soft_wrap=True,
        )  # fmt: skip
    console.print(verdict(result), soft_wrap=True)


def told(outcome: Outcome) -> str:
    """What became of a finding, a sentence a line."""
    lines = [fix.how for fix in outcome.fixed]
    return "\n".join([*lines, *(f"left: {left.why}" + (f"; what it takes: {left.takes}" if left.takes else "") for left in outcome.left)])


def verdict(result: RepairResult) -> str:
    """The last line."""
    if not result.outcomes:
        return f"nothing to repair: {result.checkpoint} is sound; nothing was written"
    numbers = Counter({severity: result.num(severity) for severity in SEVERITIES})
    rest = ", ".join(count(number, severity) for severity, number in numbers.items() if number) or "nothing"
    done = sum(bool(outcome.fixed) for outcome in result.outcomes)
    if not done:
        return f"{'sound' if result.sound else 'NOT SOUND'}: nothing of it can be mended; left: {rest}; nothing was written"
    where = f"{result.out} would be" if result.dry_run else f"{result.out} is"
    return f"{where} {'sound' if result.sound else 'NOT SOUND'}: {count(done, 'finding')} mended, left: {rest}, in {result.seconds:.2f} s"
