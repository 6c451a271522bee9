"""repair: a finished checkpoint with faults → a new one without those that can be mended without loss.

In: a checkpoint, a new output directory and, for what only the source has, its base. Out: the output directory and a
`RepairResult`: for each finding of check how it was mended, or why it is left and what it would take. Leaves out: the repairs
themselves (repairs/), the rules (rules/) and writing (checkpoint/revision.py). The source is never opened for writing; what does not
change is hard-linked, and where only metadata is wrong no weight is read.
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtpress import terminal
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.output_place import refuse_place
from mtpress.checkpoint.own_files import refuse_foreign_files
from mtpress.checkpoint.revision import Revision, RevisionPlan, RevisionResult
from mtpress.comparison.moved_tokens import moved_tokens
from mtpress.comparison.relation import Kind, Relation, add_base_is, refuse_alone
from mtpress.comparison.weights import compare, relate
from mtpress.errors import InputError
from mtpress.models.qwen3_5.names import MTP_PREFIX, module_of
from mtpress.progress import human_bytes
from mtpress.quant_config.view import Subject
from mtpress.repairs.from_source import open_base
from mtpress.repairs.measured import together
from mtpress.repairs.mending import RELATIONS, Outcome, by_weight, find, mend_all, mend_reindexed
from mtpress.repairs.opening import open_broken, refuse_other_tasks
from mtpress.repairs.overlay import Overlay
from mtpress.repairs.repair import Context, Left
from mtpress.rules.against_source import RULES as WEIGHT_RULES
from mtpress.rules.meanings import RULES as FILE_RULES
from mtpress.rules.registry import BASE_RULES, STATIC_RULES
from mtpress.rules.rule import Finding, Severity, apply
from mtpress.terminal import count

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
COLORS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class RepairResult:
    """What repair found and did. outcomes: in the order of work; findings: what check says of the output (dry run: would say).

    relation: what the base is, where every weight was compared with it. written: whether `out` was made. linked: files that stay;
    rewritten: shard → tensors, streamed anew; sizes in bytes. made: what writing it came to, and which files are the checkpoint's own.
    """

    checkpoint: str
    out: str
    dry_run: bool
    written: bool
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    relation: Relation | None
    left_out: tuple[str, ...]
    plan: RevisionPlan | None
    made: RevisionResult | None = None
    seconds: float = 0.0

    @property
    def compared(self) -> bool:
        """Whether every weight was compared with the base."""
        return self.relation is not None

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
            "base_relation": self.relation.as_json() if self.relation is not None else None,
            "left_out": self.left_out,
            "files": {
                "linked": self.plan.linked,
                "hard_links": self.made.hard_links if self.made else (),
                "links_said": self.made.links_said if self.made else "",
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
    base_is: Kind | None = None,
    comparing: bool = True,
    keep_template: bool = False,
    copies: bool = False,
    dry_run: bool = False,
    silent: bool = False,
) -> RepairResult:
    """Makes `out` from `checkpoint` with every finding mended that has a lossless repair; nothing to mend: nothing is written.

    base: what the checkpoint was made from, for what is absent or damaged here; with `comparing` every weight is compared with it too,
    which reads both whole and finds what the base is. base_is: what it is, whatever the weights say; "source" lets it replace what differs.
    keep_template: a chat template that fails stays, and is told as left. copies: in place of hard links. dry_run: says what would be
    done, reads no weight and writes nothing. InputError where nothing can be opened, or `out` exists; ResourceError where the disk is
    full. Errors that are left are no exception: RepairResult.sound says.
    """
    started = time.perf_counter()
    target = Path(out)
    refuse_place(target, [checkpoint, *([base] if base is not None else [])])
    source = open_base(base) if base is not None else None
    opened = open_broken(checkpoint, source)
    refuse_foreign_files(opened.stored.path)
    refuse_other_tasks(opened.stored)
    measured = None
    if source is not None and comparing and not dry_run:
        measured = compare(Subject(opened.stored), source, given=base_is, silent=silent)
    relation = measured.relation if measured is not None else None
    if (base_is or (relation.kind if relation is not None else None)) == "stranger":
        source = measured = None  # nothing is taken from another model
    with Overlay(opened.stored, config_is_new=opened.config_is_new) as overlay:
        ctx = Context(overlay, source, not dry_run, measured, opened.left_out, keep_template, base_is)
        outcomes: list[Outcome] = [*mend_reindexed(ctx, opened.findings), *mend_all(ctx)]
        weighed = by_weight(ctx)
        outcomes = [*(o for o in outcomes if not o.left), *mend_all(ctx, weighed)] if weighed else outcomes
        plan = made = None
        findings = find(ctx) + (list(apply(WEIGHT_RULES, ctx.comparison)) if ctx.comparison is not None else [])
        written = any(outcome.fixed for outcome in outcomes)
        if written:
            revision = Revision(opened.stored, MTP_PREFIX)
            overlay.put_into(revision)
            plan = revision.plan()
            if not dry_run:
                entries = recorded(source, relation, opened.findings, weighed, outcomes, opened.left_out)
                made = revision.write(target, "repair", entries, copies=copies, hashing=relation is not None, silent=silent)
                findings = judged(target, ctx)
        outcomes = exact(outcomes, findings)
    return RepairResult(
        checkpoint=str(opened.stored.path),
        out=str(target),
        dry_run=dry_run,
        written=written and not dry_run,
        outcomes=tuple(outcomes),
        findings=tuple(findings),
        relation=relation,
        left_out=tuple(f"{name}: {why}" for name, why in opened.left_out.items()),
        plan=made or plan,
        made=made,
        seconds=time.perf_counter() - started,
    )


def exact(outcomes: list[Outcome], findings: list[Finding]) -> list[Outcome]:
    """What was mended, what is left of what was found, and what shows only in the output; what went with a later repair is not told."""
    told = [finding for finding in findings if finding.id not in RELATIONS]
    final = {finding.id for finding in told}
    kept = [outcome for outcome in outcomes if outcome.fixed or outcome.finding.id in final]
    left = {outcome.finding.id for outcome in kept if outcome.left}
    return kept + [Outcome(f, left=(Left("it shows in what was written", f.remedy),)) for f in told if f.id not in left]


def judged(out: Path, ctx: Context) -> list[Finding]:
    """What check says of what was written; of tensors that were not changed by what was measured of them."""
    made = Checkpoint.open(out)
    subject = Subject(made)
    findings = list(apply(STATIC_RULES, subject))
    if ctx.base is None:
        return findings
    new = ctx.overlay.new_tensors
    modules = {module_of(name) for name in new} & set(subject.quantized)
    changed = {name: info for name, info in made.tensors.items() if name in new or module_of(name) in modules}
    fresh = compare(Subject(replace(made, tensors=changed if ctx.measured is not None else {})), ctx.base, silent=True)
    fresh.moved_tokens = moved_tokens(subject, ctx.base)  # by the embeddings, which may be none of `changed`
    if ctx.comparison is None:
        return findings + list(apply(FILE_RULES, fresh))
    whole = together(ctx.comparison, fresh)
    relate(whole, ctx.base_is)
    return findings + list(apply(BASE_RULES, whole))


def recorded(
    base: Checkpoint | None,
    relation: Relation | None,
    findings: tuple[Finding, ...],
    weighed: tuple[Finding, ...],
    outcomes: list[Outcome],
    left_out: Any,
) -> dict[str, Any]:
    """What mtpress.json keeps of a repair."""
    said = {"relation": relation.as_json()} if relation is not None else {}
    return {
        "base": {"name": base.path.resolve().name, "identity": base.identity, **said} if base is not None else None,
        "findings": [finding.as_json() for finding in (*findings, *weighed)],
        "repairs": [{"id": o.finding.id, "where": o.finding.where, "how": [fix.how for fix in o.fixed]} for o in outcomes if o.fixed],
        "left": [{"id": o.finding.id, "severity": o.finding.severity, "why": [left.why for left in o.left]} for o in outcomes if o.left],
        "left_out": dict(left_out),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help="the checkpoint to repair: a directory or a Hub id; it is not changed")
    parser.add_argument("out", metavar="OUT", help="the directory to make; it must not exist")
    parser.add_argument(
        "--base", metavar="SRC", help="the checkpoint that it was made from: what it has in 16 bits fills what is absent or damaged here"
    )
    add_base_is(parser)
    parser.add_argument(
        "--no-compare", action="store_true", help="with --base: take what is missing from it, without comparing every weight with it"
    )
    parser.add_argument("--keep-template", action="store_true", help="leave a chat template that fails as it is")
    parser.add_argument("--copy", action="store_true", help="copy the files that do not change, in place of hard links to CKPT's own")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; read no weights, write nothing")


def run(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The stage as the command line calls it: (exit code, result for --json)."""
    refuse_alone(options)
    if options.no_compare and options.base is None:
        raise InputError("--no-compare: goes with --base SRC, without which nothing is compared")
    result = repair(
        options.checkpoint,
        options.out,
        options.base,
        base_is=options.base_is,
        comparing=not options.no_compare,
        keep_template=options.keep_template,
        copies=options.copy,
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
    if result.relation is not None:
        console.print(taken_from(result.relation), soft_wrap=True)
    for line in result.left_out:
        console.print(f"not taken over: {line}", soft_wrap=True)
    if result.plan is not None:
        would = "would write" if result.dry_run else "wrote"
        console.print(
            f"{would} {human_bytes(result.plan.bytes_written)}, {human_bytes(result.plan.bytes_linked)} "
            f"{'would stay' if result.dry_run else 'stay'} as they are in {count(len(result.plan.linked), 'shard')}",
            soft_wrap=True,
        )  # fmt: skip
    if result.made is not None and result.made.links_said:
        console.print(result.made.links_said, soft_wrap=True)
    console.print(verdict(result), soft_wrap=True)


def taken_from(relation: Relation) -> str:
    """What the base is, and what that means for what was taken from it."""
    means = {
        "source": "it fills what is absent or damaged" + ("; what differs becomes the base's" if relation.given else ""),
        "ancestor": "it fills what is absent or damaged, and that was not trained with the rest; no stored tensor becomes the ancestor's",
        "stranger": "nothing was taken from it",
    }
    return f"{relation.line}. So {means[relation.kind]}"


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
