"""Runs that are not disturbed, to hold disturbed ones against.

In: a source of a dozen layers. Out: `Whole` for a kind of run: its duration and the hash of every file it writes. Leaves out:
the disturbing (test_kills.py, test_full_disk.py).
"""

import hashlib
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from broken import Case, make_sound
from fork_server import ForkServer

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.plan.budget import choices
from mtpress.plan.recipe import load_recipe, parse_recipe

RECORD = "mtpress.json"
# The kinds of broken.Case, and what a run of samples carries besides: sums of products, codes that make up for others, measurements.
CARRIES: dict[str, dict[str, Any]] = {"hessian": {"rounding": "hessian"}, "gptq": {"rounding": "gptq"}, "budget": {}}
KINDS = ("weight-only", "calibrated", *CARRIES)
QUICK = KINDS[:3]
ORDER = (*QUICK, *QUICK, "gptq", *QUICK[1:], "budget")  # in which runs are disturbed; the last two kinds take ten times as long
MAX_SHARD_BYTES = 2_000_000  # a dozen megabytes of output then have several shards


@dataclass(frozen=True)
class Whole:
    """hashes: file → SHA-256 without the record, whose timings differ; sha256: what the record says of the files."""

    seconds: float
    hashes: dict[str, str]
    sha256: dict[str, str]
    num_bytes: int


def make_source(directory: Path) -> Case:
    """Twelve layers of hidden size 512 in three shards, and four samples."""
    return make_sound(directory, layers=12, hidden_size=512, intermediate_size=1024)


def arguments(case: Case, kind: str, out: Path) -> list[str]:
    """The command line of a kind of run."""
    if kind not in CARRIES:
        return case.arguments(kind, out)
    file = case.recipe.with_name(f"{kind}.yaml")
    if not file.exists():
        content = load_recipe(case.recipe).canonical() | CARRIES[kind]
        if kind == "budget":
            content = {key: value for key, value in content.items() if key not in ("format", "quantize")}
            budget = {"bytes": 1 << 40, "candidates": ["nvfp4", "fp8"]}
            reach = choices(Checkpoint.open(case.source), parse_recipe(content | {"budget": budget}, "here"))
            content["budget"] = budget | {"bytes": (reach.least_bytes + reach.most_bytes) // 2}
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return ["quantize", str(case.source), str(out), "--recipe", str(file), "--calibration", str(case.samples)]


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below, the record left out."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != RECORD
    }


def record(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / RECORD).read_text())
    return content


def recorded_hashes(out: Path) -> dict[str, str]:
    """What the record says of every file but itself."""
    return {name: digest for name, digest in record(out)["output_sha256"].items() if name != RECORD}


def run_whole(server: ForkServer, case: Case, kind: str, out: Path, times: int = 3, **limits: Any) -> Whole:
    """Runs a kind of command line undisturbed; seconds is the median."""
    seconds = []
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        run = server.run(arguments(case, kind, out), **limits)
        assert run.code == 0, run.stderr
        seconds.append(run.seconds)
    whole = Whole(statistics.median(seconds), hashes(out), recorded_hashes(out), sum(p.stat().st_size for p in out.iterdir()))
    assert whole.sha256 and whole.sha256.items() <= whole.hashes.items()
    return whole
