"""Broken inputs by the hundred: each gets exit code 2 and one line, quickly and in little memory, and leaves nothing behind.

`make soak` runs 1,000; the ordinary suite a sample. A case is made from its seed alone:
`MTPRESS_SOAK_SEED=417 pytest tests/soak/test_mutations.py -s` runs that one and keeps its files.

check is the stage that names faults: for a broken checkpoint it may end with exit code 1 and an error among its findings.
"""

import hashlib
import math
import os
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from broken import Case, Way, all_ways, copy_of, make_sound
from fork_server import ForkServer, Run

FULL, SAMPLE = 1000, 60
MAX_BYTES, MAX_SECONDS, MAX_LINE = 1_000_000_000, 20.0, 600
SEED = "mtpress soak 1"


@dataclass(frozen=True)
class Mutation:
    """One broken input and what was run on it."""

    seed: int
    way: Way
    stage: str
    did: str

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.way.kind}, {self.way.name}, {self.stage}: {self.did}"


def digests(case: Case) -> dict[str, str]:
    """Of every file of the source, and of what else was handed in; links and pipes by their kind."""
    found = {}
    for path in sorted(case.source.parent.rglob("*")):
        plain = path.is_file() and not path.is_symlink()
        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else str(path.lstat().st_mode)
    return found


def mutate(seed: int, sound: Case, directory: Path) -> tuple[Mutation, Case]:
    """The case of a seed. The ways take turns, so that 1,000 seeds try each of them a dozen times."""
    ways = all_ways()
    way = ways[seed % len(ways)]
    rng = random.Random(f"{SEED}/{seed}")
    for _ in range(200):
        case = copy_of(sound, directory, rng)
        if did := way.apply(case):
            return Mutation(seed, way, rng.choice(way.stages), did), case
    raise AssertionError(f"seed {seed}: {way.name} breaks nothing")


def faults(mutation: Mutation, run: Run) -> list[str]:
    """What is wrong with how the command ended; nothing else than this decides."""
    found = []
    lines = run.error_lines
    if run.timed_out or run.processor_seconds > MAX_SECONDS:
        found.append(f"took {run.seconds:.1f} s, {run.processor_seconds:.1f} of a processor")
    if run.peak_bytes > MAX_BYTES:
        found.append(f"took {run.peak_bytes / 1e6:.0f} MB")
    if "Traceback" in run.stderr:
        found.append("a traceback")
    if mutation.stage == "check" and run.code == 1:
        if lines or "NOT SOUND" not in run.stdout:
            found.append("exit code 1 without an error among the findings")
        return found
    if run.code != 2:
        found.append(f"exit code {run.code}, signal {run.signal}")
    stage = mutation.stage if mutation.stage in ("inspect", "check") else "quantize"
    if len(lines) != 1 or not lines[0].startswith(f"mtpress {stage}: ") or len(lines[0]) > MAX_LINE:
        found.append(f"{len(lines)} lines on stderr")
    if run.stdout and run.code == 2:
        found.append("something on stdout")
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_sound(tmp_path_factory.mktemp("sound"))


def test_the_sound_input_is_sound(sound: Case, tmp_path: Path, server: ForkServer) -> None:
    """Without a mutation every stage is content; else no refusal would mean anything."""
    for stage in ("weight-only", "calibrated", "inspect", "check"):
        run = server.run(sound.arguments(stage, tmp_path / stage))
        assert run.code == 0 and not run.error_lines, run.stderr + run.stdout


def test_mutations(sound: Case, tmp_path: Path, server: ForkServer, soak: bool) -> None:
    chosen = os.environ.get("MTPRESS_SOAK_SEED")
    step = next(n for n in range(FULL // SAMPLE, FULL) if math.gcd(n, len(all_ways())) == 1)  # so the sample tries as many ways as it can
    seeds = [int(chosen)] if chosen else list(range(FULL)) if soak else [(i * step) % FULL for i in range(SAMPLE)]
    failures: list[str] = []
    runs: dict[str, list[Run]] = defaultdict(list)
    slowest, largest = (0.0, ""), (0, "")
    for seed in seeds:
        mutation, case = mutate(seed, sound, tmp_path / "case")
        out = tmp_path / "out"
        before = digests(case)
        run = server.run(case.arguments(mutation.stage, out), limit_s=6 * MAX_SECONDS)
        found = faults(mutation, run)
        if digests(case) != before:
            found.append("the input was touched")
        if left := [p.name for p in tmp_path.iterdir() if p.name.startswith("out")]:
            found.append(f"left behind: {', '.join(left)}")
        for path in tmp_path.glob("out*"):
            path.rename(tmp_path / f"left-{seed}-{path.name}")
        if found:
            failures.append(f"{mutation}\n    {'; '.join(found)}\n    {run.stderr[-700:].strip()}")
        if chosen:
            print(f"\n{mutation}\n{case.source.parent}\n{run.stderr}{run.stdout}")
        runs[mutation.way.kind].append(run)
        slowest, largest = max(slowest, (run.processor_seconds, str(mutation))), max(largest, (run.peak_bytes, str(mutation)))
    print()
    for kind, done in runs.items():
        longest, most = max(r.processor_seconds for r in done), max(r.peak_bytes for r in done) / 1e6
        print(f"{len(done):5d} {kind}: slowest {longest:.1f} s of a processor, most memory {most:.0f} MB")
    print(f"{len(seeds)} mutations; slowest {slowest[0]:.1f} s of a processor ({slowest[1]})")
    print(f"largest {largest[0] / 1e6:.0f} MB ({largest[1]})")
    assert not failures, f"{len(failures)} of {len(seeds)} mutations:\n" + "\n".join(failures)
