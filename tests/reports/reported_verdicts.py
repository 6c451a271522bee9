"""What check, quantize, repair and eval say of a reported input, in a few words each: the rows of docs/reports.md.

In: an input of reported_inputs.py. Out: `Verdicts`. `python tests/reports/reported_verdicts.py [NAME…]` prints the rows as they are now.
Leaves out: which words are right (the table in docs/reports.md, held against this by test_reports.py).
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from reported_inputs import REPORTED, Reported

from checkpoints import Edit, weight_only
from mtpress.builtin import BUILTIN_MODEL
from mtpress.errors import MtpressError
from mtpress.rules.rule import Finding
from mtpress.stages.check import check
from mtpress.stages.eval import evaluate
from mtpress.stages.quantize import quantize
from mtpress.stages.repair import RepairResult, repair

TEXTS = ("A red kite over Brook. The tools are old, the hands are new.", "12 + 30 = 42. 7 + 8 = 15.")
RECIPE = "nvfp4-mtp-vlm"
HEADER = ("| input | reported in | `check` | `quantize` | `repair`, with `--base` | `eval` |", "|---|---|---|---|---|---|")


@dataclass(frozen=True)
class Verdicts:
    """One input: what the stages say. repaired: the output of repair with the base, where one was made."""

    reported: Reported
    path: Path
    check: str
    quantize: str
    repair: str
    evaluate: str
    repaired: Path | None

    @property
    def row(self) -> str:
        return f"| {self.reported.what} | {self.reported.threads} | {self.check} | {self.quantize} | {self.repair} | {self.evaluate} |"


def make(reported: Reported, folder: Path) -> Path:
    """The input as a directory."""
    made = Path(shutil.copytree(BUILTIN_MODEL, folder / reported.name))
    edit = Edit(made)
    reported.make(edit)
    edit.save()
    return made


def ask(reported: Reported, folder: Path) -> Verdicts:
    """Runs the stages on it; AssertionError where they change it."""
    path = make(reported, folder)
    before = contents(path)
    out = folder / "repaired"
    said = Verdicts(
        reported,
        path,
        check=attempt(lambda: judged(check(path, silent=True).findings)),
        quantize=attempt(lambda: built(path, folder / "quantized")),
        repair=attempt(lambda: mended(repair(path, out, BUILTIN_MODEL, silent=True))),
        evaluate=attempt(lambda: measured(path)),
        repaired=out if out.exists() else None,
    )
    assert contents(path) == before, f"{reported.name}: the input was changed"
    return said


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def attempt(stage: Callable[[], str]) -> str:
    """What the stage says, or the line with which it refuses, without the path at its start."""
    try:
        return stage()
    except MtpressError as error:
        return f"refuses: {shortened(str(error))}"


def shortened(line: str) -> str:
    """A line without the directory that it begins with, and no longer than a cell of a table takes."""
    words = [word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in line.replace("|", "\\|").split()]
    return " ".join(words)


def judged(findings: tuple[Finding, ...]) -> str:
    """The verdict, and the findings that are more than notes."""
    named = {severity: [f"`{f.id}`" for f in findings if f.severity == severity] for severity in ("error", "warning")}
    verdict = "**not sound**" if named["error"] else "sound"
    return ": ".join(part for part in (verdict, ", ".join(dict.fromkeys(named["error"] + named["warning"]))) if part)


def built(path: Path, out: Path) -> str:
    """What the build holds, and what check says of it."""
    result = quantize(path, out, weight_only(RECIPE), silent=True)
    return f"{result.num_quantized} matrices, {judged(check(out, silent=True).findings)}"


def mended(result: RepairResult) -> str:
    """What was done, and what is left."""
    done = [fix.how for outcome in result.fixed for fix in outcome.fixed]
    left = [f"left: {entry.why}" for outcome in result.left for entry in outcome.left]
    return "; ".join(shortened(line) for line in dict.fromkeys([*done, *left])) or "nothing to do"


def measured(path: Path) -> str:
    """Whether it computes what the base computes."""
    data = path.parent / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found = evaluate([path], BUILTIN_MODEL, [str(data)], resamples=2, silent=True).checkpoints[path.name]
    kl = found.groups["all"].kl_mean.value
    drafts = "" if found.acceptance is not None else ", no drafts"
    size = "0" if kl < 1e-6 else "above 0"
    return f"KL {size}{drafts}"


def main() -> None:
    wanted = sys.argv[1:]
    print(*HEADER, sep="\n")
    for reported in REPORTED:
        if wanted and not any(reported.name.startswith(name) for name in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(ask(reported, Path(folder)).row, flush=True)
            except Exception as error:
                print(f"| {reported.what} | {reported.threads} | BUG {type(error).__name__}: {error} |", flush=True)


if __name__ == "__main__":
    main()
