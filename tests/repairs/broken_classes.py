"""Every broken class of tests/breaks.py through repair, as rows of the table in docs/repair.md.

In: a sound checkpoint, its base, a way to break it. Out: what repair makes of it with and without the base, and the row.
`python tests/repairs/broken_classes.py` prints the whole table. Leaves out: asserting (test_broken_classes.py).
"""

import hashlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import format_breaks
from breaks import CASES, Break
from checkpoints import SMALL_FORMATS, Edit, write_small
from mtpress.plan.recipe import load_recipe
from mtpress.repairs.mending import Outcome
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize
from mtpress.stages.repair import RepairResult, repair

VLM = "nvfp4-mtp-vlm"
REFUSED = {"a_draft_head_alone"}  # there is no checkpoint to repair; tests/stages/test_repair.py has the line
ALL = [(name, VLM, expected, function) for name, expected, function in CASES if name not in REFUSED] + format_breaks.CASES
HEADER = ("| what is broken | `check` says | `repair` does |", "|---|---|---|")


@dataclass(frozen=True)
class Repaired:
    """One class: the broken directory, the rules that check names, and what repair made of it without and with the base."""

    name: str
    broken: Path
    said: tuple[str, ...]
    alone: RepairResult
    with_base: RepairResult

    @property
    def row(self) -> str:
        said = ", ".join(f"`{rule_id}`" for rule_id in self.said) or "nothing"
        return f"| {self.name.replace('_', ' ')} | {said} | {done(self.alone, self.with_base)} |"


def done(alone: RepairResult, with_base: RepairResult) -> str:
    """What is done without a base; what more with one, where something is left then; what is left in any case."""
    parts = [told(alone.fixed)]
    left = {outcome.finding.id: outcome.left[0].why for outcome in alone.left}
    always = {outcome.finding.id for outcome in with_base.left}
    if left.keys() - always:
        parts.append(f"with `--base`: {told(with_base.fixed)}")
    parts += [f"left: {why}" for rule_id, why in left.items() if rule_id in always]
    return "; ".join(part for part in parts if part) or "nothing"


def told(outcomes: tuple[Outcome, ...]) -> str:
    return "; ".join(dict.fromkeys(fix.how for outcome in outcomes for fix in outcome.fixed))


def hashes(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def break_and_repair(name: str, function: Break, sound: Path, base: Path, folder: Path) -> Repaired:
    """Breaks a copy of `sound` and repairs it twice, in `folder`; a broken checkpoint that changes by it is an AssertionError."""
    broken = Path(shutil.copytree(sound, folder / "broken"))
    edit = Edit(broken)
    function(edit)
    edit.save()
    before = hashes(broken)
    said = tuple(dict.fromkeys(finding.id for finding in check(broken, silent=True).findings))
    alone = repair(broken, folder / "alone", silent=True)
    with_base = repair(broken, folder / "with-base", base, silent=True)
    assert hashes(broken) == before, f"{name}: the broken checkpoint was changed"
    return Repaired(name, broken, said, alone, with_base)


def main() -> None:
    with tempfile.TemporaryDirectory() as named:
        folder = Path(named)
        base = write_small(folder / "bf16")
        sound = {VLM: folder / VLM}
        quantize(base, sound[VLM], load_recipe(VLM).model_copy(update={"constant_input_scale": 0.01}), silent=True)
        sound |= {kind: write(base, sound[VLM], folder / kind) for kind, write in SMALL_FORMATS.items()}
        print(*HEADER, sep="\n")
        for name, kind, _, function in ALL:
            (folder / name).mkdir()
            print(break_and_repair(name, function, sound[kind], base, folder / name).row)


if __name__ == "__main__":
    main()
