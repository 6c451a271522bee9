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

from broken import Case, make_sound
from fork_server import ForkServer

RECORD = "mtpress.json"
KINDS = ("weight-only", "calibrated")
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
        run = server.run(case.arguments(kind, out), **limits)
        assert run.code == 0, run.stderr
        seconds.append(run.seconds)
    whole = Whole(statistics.median(seconds), hashes(out), recorded_hashes(out), sum(p.stat().st_size for p in out.iterdir()))
    assert whole.sha256 and whole.sha256.items() <= whole.hashes.items()
    return whole
