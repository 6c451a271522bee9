"""graft that is killed, whose disk fills up, or that is handed broken inputs: OUT is whole or not there, the inputs are untouched.

`make soak` kills 200 runs, fills the disk at 20 points and breaks 600 inputs; the ordinary suite takes a sample. Every case is made
from its number alone.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from broken import all_ways, copy_of, make_sound
from fork_server import ForkServer, Run
from test_full_disk import fill_the_disk
from whole_runs import hashes, record, recorded_hashes

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.revision import Revision
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.models.qwen3_5.names import MTP_PREFIX, MTP_TENSORS

KILLS, DISKS, BROKEN = (200, 4), (20, 2), (600, 40)
DISK_BYTES = 256_000_000
SHARD_BYTES = 500_000  # a few megabytes of output then have several shards
SEED = "mtpress graft 1"
MAX_BYTES, MAX_SECONDS, MAX_LINE = 1_500_000_000, 30.0, 600  # a header of 400,000 tensors is copied, not refused


@dataclass(frozen=True)
class Graft:
    """A checkpoint with a wrong head, some of it quantized, in several shards; its base; what an undisturbed run makes of them."""

    source: Path
    base: Path
    whole: dict[str, str]
    seconds: float

    def arguments(self, out: Path) -> list[str]:
        return ["graft", str(self.source), str(out), "--from", str(self.base), "--replace-head"]

    def inputs(self) -> dict[str, str]:
        return {f"{path.name}/{name}": digest for path in (self.source, self.base) for name, digest in hashes(path).items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, server: ForkServer) -> Graft:
    place = tmp_path_factory.mktemp("graft")
    base = make_sound(place / "base", layers=8, hidden_size=256, intermediate_size=512)
    run = server.run(base.arguments("weight-only", place / "quantized"), max_shard_bytes=SHARD_BYTES)
    assert run.code == 0, run.stderr
    revised = Revision(Checkpoint.open_stored(place / "quantized"), MTP_PREFIX)
    for name in MTP_TENSORS:
        info = revised.source.tensors[name]
        revised.compute(OutputTensor(name, "BF16", info.shape), lambda shape=info.shape: torch.ones(shape, dtype=torch.bfloat16))
    revised.drop("mtp.norm.weight")
    revised.compute(OutputTensor("mtp.norm.qweight", "I32", (8, 8)), lambda: torch.zeros(8, 8, dtype=torch.int32))
    revised.write(place / "source", "break", {}, silent=True)
    graft = Graft(place / "source", base.source, {}, 0.0)
    runs = [server.run(graft.arguments(place / f"out-{i}")) for i in range(2)]
    assert all(run.code == 0 for run in runs), runs[0].stderr
    whole = hashes(place / "out-0")
    assert whole == hashes(place / "out-1")
    assert recorded_hashes(place / "out-0").items() <= whole.items()
    linked = [path.name for path in (place / "out-0").glob("*.safetensors") if path.stat().st_nlink > 1]
    assert linked and len(linked) < sum(name.endswith(".safetensors") for name in whole)  # both ways are taken
    for i in range(2):
        shutil.rmtree(place / f"out-{i}")
    return Graft(graft.source, graft.base, whole, min(run.seconds for run in runs))


def test_killed_grafts(made: Graft, tmp_path: Path, server: ForkServer, soak: bool) -> None:
    before, num, ended = made.inputs(), KILLS[0 if soak else 1], Counter[str]()
    for number in range(num):
        out = tmp_path / "out"
        moment = made.seconds * (number + random.Random(f"{SEED}/{number}").random()) / num
        if number % 2:
            run, said = server.run(made.arguments(out), kill_after_s=moment), f"run {number}, killed after {moment:.4f} s"
        else:
            run, said = (
                killed_while_writing(server, made.arguments(out), out, moment / 4),
                f"run {number}, killed {moment / 4:.4f} s into it",
            )
        said += f" of {made.seconds:.4f} s\n{run.stderr}"
        assert run.signal == signal.SIGKILL or run.code == 0, said
        ended["killed" if run.signal else "done before"] += 1
        if out.exists():  # the name is given last
            assert hashes(out).items() >= made.whole.items(), said
        else:
            ended["left a partial directory"] += out.with_name("out.partial").exists()
            again = server.run(made.arguments(out))
            assert again.code == 0, f"{said}\n{again.stderr}"
            same(out, made.whole, said)
        assert not out.with_name("out.partial").exists(), said
        assert made.inputs() == before, said
        shutil.rmtree(out)
    print(f"\n{num} grafts of {made.seconds:.2f} s: {dict(ended)}")
    assert ended["left a partial directory"] >= max(1, num // 10)


def killed_while_writing(server: ForkServer, arguments: list[str], out: Path, seconds: float) -> Run:
    """Killed so many seconds after its partial directory appears."""
    child, end = server.start(arguments), time.monotonic() + 60
    partial = out.with_name(f"{out.name}.partial")
    while not partial.exists() and time.monotonic() < end:
        time.sleep(0.0005)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    return server.wait()


def same(out: Path, whole: dict[str, str], said: str) -> None:
    assert hashes(out) == whole, said
    assert recorded_hashes(out).items() <= whole.items(), said
    assert record(out)["stage"] == "graft"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """An empty tmpfs, where hard links to the source are impossible; None where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", place], check=True)


def test_full_disks(made: Graft, tmp_path: Path, disk: Path | None, server: ForkServer, soak: bool) -> None:
    before, num = made.inputs(), DISKS[0 if soak else 1]
    out = (disk or tmp_path) / "out"
    largest = max((made.source / name).stat().st_size for name in made.whole if name.endswith(".safetensors"))
    total = sum(path.stat().st_size for path in made.source.iterdir())
    for number in range(num):
        room = int((total if disk else largest) * (number + 0.5) / num)
        said = f"point {number}, room for {room} bytes"
        arguments = made.arguments(out)
        run = fill_the_disk(server, arguments, out, room) if disk else server.run(arguments, max_file_bytes=room)
        refused(run, out, said)
        if disk:
            (disk / "ballast").unlink()
        assert made.inputs() == before, said
    run = server.run(made.arguments(out))
    assert run.code == 0, run.stderr
    assert hashes(out) == made.whole
    print(f"\n{num} full disks ({'a tmpfs filled, nothing linked' if disk else 'no mounting here, files limited'})")


def refused(run: Run, out: Path, said: str) -> None:
    assert run.code == 2, f"{said}: exit code {run.code}, signal {run.signal}\n{run.stderr}"
    lines = error_lines(run)
    assert len(lines) == 1 and lines[0].startswith("mtpress graft: ") and str(out.parent) in lines[0], f"{said}\n{run.stderr}"
    assert "free space or choose another disk" in lines[0], lines[0]
    assert not out.exists() and not out.with_name("out.partial").exists(), said


def error_lines(run: Run) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.strip() and not line.startswith("graft  ")]


def test_broken_inputs(tmp_path: Path, server: ForkServer, soak: bool) -> None:
    """A broken checkpoint with a sound base, and the other way round: refused in one line, or grafted all the same (a tokenizer, say)."""
    sound, donor = make_sound(tmp_path / "sound"), make_sound(tmp_path / "donor")
    revised = Revision(Checkpoint.open_stored(donor.source), MTP_PREFIX)
    revised.compute(OutputTensor("mtp.norm.weight", "BF16", (64,)), lambda: torch.ones(64, dtype=torch.bfloat16))
    revised.write(tmp_path / "base", "change", {}, silent=True)
    run = server.run(["graft", str(sound.source), str(tmp_path / "out"), "--from", str(tmp_path / "base"), "--replace-head"])
    assert run.code == 0, run.stderr
    shutil.rmtree(tmp_path / "out")
    ways = [way for way in all_ways() if way.kind not in ("samples", "recipe")]
    chosen = os.environ.get("MTPRESS_SOAK_SEED")
    full, sample = BROKEN
    seeds = [int(chosen)] if chosen else list(range(full)) if soak else [(i * 7) % full for i in range(sample)]
    failures, ended = [], Counter[str]()
    for seed in seeds:
        way, rng = ways[seed % len(ways)], random.Random(f"{SEED}/{seed}")
        did, case = "", sound
        while not did:
            case = copy_of(sound, tmp_path / "case", rng)
            did = way.apply(case)
        pair = (case.source, tmp_path / "base") if seed % 2 else (tmp_path / "base", case.source)
        out = tmp_path / "out"
        before = contents(case.source)
        run = server.run(["graft", str(pair[0]), str(out), "--from", str(pair[1]), "--replace-head"], limit_s=6 * MAX_SECONDS)
        found = faults(run, out)
        if contents(case.source) != before:
            found.append("the input was touched")
        if found:
            failures.append(f"seed {seed}: {way.name}, {did}: {'; '.join(found)}\n    {run.stderr[-600:].strip()}")
        ended["refused" if run.code == 2 else "grafted"] += 1
        for path in tmp_path.glob("out*"):
            shutil.rmtree(path)
    print(f"\n{len(seeds)} broken inputs: {dict(ended)}")
    assert not failures, f"{len(failures)} of {len(seeds)}:\n" + "\n".join(failures)
    assert ended["refused"] >= len(seeds) // 3


def contents(directory: Path) -> dict[str, bytes | int]:
    """Of every file; links and pipes by their kind."""
    return {
        str(path): path.read_bytes() if path.is_file() and not path.is_symlink() else path.lstat().st_mode
        for path in sorted(directory.rglob("*"))
    }


def faults(run: Run, out: Path) -> list[str]:
    found = []
    if run.timed_out or run.processor_seconds > MAX_SECONDS:
        found.append(f"took {run.seconds:.1f} s, {run.processor_seconds:.1f} of a processor")
    if run.peak_bytes > MAX_BYTES:
        found.append(f"took {run.peak_bytes / 1e6:.0f} MB")
    lines = error_lines(run)
    if run.code == 2:
        if len(lines) != 1 or not lines[0].startswith("mtpress graft: ") or len(lines[0]) > MAX_LINE or run.stdout:
            found.append(f"{len(lines)} lines on stderr")
        if out.exists() or out.with_name("out.partial").exists():
            found.append("left something behind")
    elif run.code == 0:
        if lines:
            found.append("exit code 0 with an error")
        made = Checkpoint.open(out)
        if set(MTP_TENSORS) - made.tensors.keys() or made.unindexed or out.with_name("out.partial").exists():
            found.append("what it made is not whole")
    else:
        found.append(f"exit code {run.code}, signal {run.signal}")
    return found
