"""The loop of repair: find, mend what has a repair, find again, until nothing more can be mended.

In: a `Context` and what finds. Out: an `Outcome` for every finding, in the order in which they were dealt with. Leaves out: opening
(opening.py) and writing (stages/repair.py).

One finding is mended at a time and everything is found anew, because one repair often takes several findings away, and because what a
wrong prefix or config hid shows only then. The order is that of `Turn`, and within one that of the rules.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from mtpress.comparison.weights import compare
from mtpress.quant_config.view import Subject
from mtpress.repairs.draft_head import mtp_unindexed
from mtpress.repairs.files import reindexed
from mtpress.repairs.registry import REPAIRS
from mtpress.repairs.repair import Context, Fix, Left
from mtpress.rules.against_source import RULES as WEIGHT_RULES
from mtpress.rules.meanings import RULES as FILE_RULES
from mtpress.rules.registry import STATIC_RULES
from mtpress.rules.rule import QUANTIZE_AGAIN, Finding, apply

RELATIONS = ("base-ancestor", "base-stranger")  # what the base is: said beside the findings
MAX_ROUNDS = 200


@dataclass(frozen=True)
class Outcome:
    """What became of a finding: fixed says how, left says why. Both where a part of it could be mended."""

    finding: Finding
    fixed: tuple[Fix, ...] = ()
    left: tuple[Left, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "finding": self.finding.as_json(),
            "fixed": [fix.how for fix in self.fixed],
            "left": [asdict(left) for left in self.left],
        }


Key = tuple[str, str, tuple[str, ...]]


def key(finding: Finding) -> Key:
    return finding.id, finding.message, finding.where


def find(ctx: Context) -> list[Finding]:
    """What check says of the overlay without reading weights and, with a base, of its files."""
    if ctx.overlay.found is None:
        ctx.overlay.found = _find(ctx)
    return list(ctx.overlay.found)


def _find(ctx: Context) -> list[Finding]:
    subject = ctx.subject
    found = list(apply(STATIC_RULES, subject))
    if ctx.base is not None:
        files = compare(Subject(replace(subject.checkpoint, tensors={})), ctx.base, silent=True)
        files.relation = ctx.measured.relation if ctx.measured is not None else None
        found += apply(FILE_RULES, files)
    return found


def by_weight(ctx: Context) -> tuple[Finding, ...]:
    """The findings of what was measured, of tensors that are still as they are stored; what an ancestor leaves is none to be mended."""
    return tuple(f for f in apply(WEIGHT_RULES, ctx.comparison) if f.id not in RELATIONS) if ctx.comparison is not None else ()


def mend_reindexed(ctx: Context, findings: tuple[Finding, ...]) -> Iterator[Outcome]:
    """What opening by what is stored has mended: findings of check that the overlay no longer has.

    Only the repairs of the index say how. Another would put something in the place of what was never missing.
    """
    ids = {finding.id for finding in find(ctx)}
    for finding in findings:
        if finding.id not in ids:
            mend = REPAIRS[finding.id].mend
            fixes = [step for step in mend(ctx, finding) if isinstance(step, Fix)] if mend is reindexed or mend is mtp_unindexed else []
            left_out = tuple(Fix(f"{name} left out: it {why}") for name, why in ctx.left_out.items())
            yield Outcome(finding, tuple(fixes) or left_out or (Fix("gone with the index that was wrong"),))


def mend_all(ctx: Context, given: tuple[Finding, ...] = ()) -> Iterator[Outcome]:
    """Mends until nothing changes. given: findings that a comparison made, each dealt with once, beside those that find() makes."""
    stuck: set[Key] = set()
    waiting = list(given)
    for _ in range(MAX_ROUNDS):
        before = find(ctx)
        candidates = [finding for finding in [*waiting, *before] if key(finding) not in stuck]
        if not candidates:
            return
        finding = min(candidates, key=lambda f: REPAIRS[f.id].turn)
        waiting = [other for other in waiting if other is not finding]
        outcome, changed = _mend(ctx, finding)
        if not changed:
            stuck.add(key(finding))
            yield outcome
            continue
        now = {key(other) for other in find(ctx)}
        if outcome.fixed:
            yield replace(outcome, left=() if finding in before else outcome.left)
        gone = {other.id for other in before} - {found[0] for found in now} - {finding.id}
        for other in before:
            if other.id in gone:
                yield Outcome(other, outcome.fixed)
    raise AssertionError("repairs undo one another")


def _mend(ctx: Context, finding: Finding) -> tuple[Outcome, bool]:
    """The outcome of one repair, and whether it changed anything."""
    repair = REPAIRS[finding.id]
    if repair.mend is None:
        return Outcome(finding, left=(Left(repair.summary, ""),)), False
    before = ctx.overlay.state
    steps = list(repair.mend(ctx, finding))
    changed = ctx.overlay.state != before
    fixed = tuple(step for step in steps if isinstance(step, Fix)) if changed else ()
    left = tuple(step for step in steps if isinstance(step, Left))
    if not changed and not left:
        left = (Left("its repair changes nothing here", QUANTIZE_AGAIN),)
    return Outcome(finding, fixed, left), changed
