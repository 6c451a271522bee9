"""Disks that fill up while a run is writing: one line that names the disk and what to do, and --resume ends the run.

`make soak` fills the disk at 20 points of the output, the ordinary suite at two. The disk is a tmpfs of its own, large enough
when the run looks at it and filled with ballast as soon as the first shard appears, so that just so many bytes fit. Where mounting
is refused, the system limits the size of a file instead.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fork_server import ForkServer, Run
from whole_runs import MAX_SHARD_BYTES, ORDER, Whole, arguments, hashes, make_source, record, recorded_hashes, run_whole

FULL, SAMPLE = 20, 2
DISK_BYTES = 256_000_000
PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """An empty tmpfs, or None where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", place], capture_output=True, check=False)
    if mounted.returncode:
        yield None
        return
    yield place
    subprocess.run(["umount", place], check=True)


def test_full_disks(tmp_path: Path, disk: Path | None, server: ForkServer, soak: bool) -> None:
    case = make_source(tmp_path / "case")
    before = hashes(case.source)
    num = FULL if soak else SAMPLE
    shards = MAX_SHARD_BYTES if disk is not None else None
    resumed_behind = []
    whole = {kind: run_whole(server, case, kind, tmp_path / kind, times=1, max_shard_bytes=shards) for kind in dict.fromkeys(ORDER[:num])}
    for number in range(num):
        kind = ORDER[number % len(ORDER)]
        out = (disk or tmp_path) / "out"
        room = int(whole[kind].num_bytes * (number + 0.5) / num)
        said = f"point {number}, {kind}, room for {room} of {whole[kind].num_bytes} bytes"
        command = arguments(case, kind, out)
        run = fill_the_disk(server, command, out, room) if disk else server.run(command, max_file_bytes=room)
        refused(run, out, said)
        if disk:
            (disk / "ballast").unlink()
        run = server.run([*command, "--resume"], max_shard_bytes=shards)
        assert run.code == 0, f"{said}\n{run.stderr}"
        same(out, whole[kind], said)
        resumed_behind.append(record(out).get("resumed", {}).get("steps_before", 0))
        shutil.rmtree(out)
        assert hashes(case.source) == before
    how = "a tmpfs filled" if disk else "no mounting here, files limited"
    print(f"\n{num} full disks ({how}); finished steps at the resume: {resumed_behind}")
    assert max(resumed_behind) > 0


def fill_the_disk(server: ForkServer, command: list[str], out: Path, room: int) -> Run:
    """Runs until the first shard stands in OUT.partial, then leaves room there for just so many bytes, and lets it go on."""
    partial = out.with_name(out.name + ".partial")
    child = server.start(command, max_shard_bytes=MAX_SHARD_BYTES)
    end = time.monotonic() + 60
    while not list(partial.glob("*.safetensors")) and time.monotonic() < end:
        time.sleep(0.0005)
    os.kill(child, signal.SIGSTOP)
    ballast = os.open(out.with_name("ballast"), os.O_WRONLY | os.O_CREAT)
    size = DISK_BYTES - (room + PAGE - 1) // PAGE * PAGE
    while size > 0:
        try:
            os.posix_fallocate(ballast, 0, size)
            break
        except OSError:  # more than that was written already: the disk is full now
            size -= PAGE * 16
    os.close(ballast)
    os.kill(child, signal.SIGCONT)
    return server.wait()


def refused(run: Run, out: Path, said: str) -> None:
    assert run.code == 2, f"{said}: exit code {run.code}, signal {run.signal}\n{run.stderr}"
    assert len(run.error_lines) == 1, f"{said}\n{run.stderr}"
    line = run.error_lines[0]
    assert line.startswith("mtpress quantize: ") and str(out.parent) in line, line
    assert "free space or choose another disk" in line, line
    assert not out.exists(), said


def same(out: Path, whole: Whole, said: str) -> None:
    assert hashes(out) == whole.hashes, said
    assert recorded_hashes(out) == whole.sha256, said
    assert not out.with_name(out.name + ".partial").exists(), said
