"""What of a run is finished, so that the same command with --resume goes on where it stopped.

A directory `.mtpress-partial` in OUT.partial, small, and gone when the output gets its name:
    run.json             what the bytes of the output depend on: recipe, source files, calibration, versions
    SHARD.jsonl          one line for each finished step of a shard, in order:
                         {"step": "layer 7", "num_tensors": 96, "end": 1270874112, "sha256": "…", "sources": {…}}
                         num_tensors and end (bytes, header included) count from the start of the file, sha256 is of those
                         bytes, sources are the SHA-256 of the stored matrices that the step has quantized
    sensitivity.lines    recipes with a budget: what was measured before the first step (sensitivity_pass.py)
    hidden-0…2.bin       hidden states of the samples at three layer boundaries (hidden_states.py)
    lock, SHARD.lock     held by the process that writes here, and by the worker that writes a shard
A line is appended only when all that it tells of is on the disk, so what it says holds after a kill or a power cut; a torn
last line counts as not written. In: steps as they finish. Out: what is finished, or how two runs differ.
"""

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtpress.checkpoint import read_json_object
from mtpress.errors import InputError, ResourceError

JOURNAL_NAME = ".mtpress-partial"  # also says that mtpress may delete the directory it stands in
RUN_NAME = "run.json"
SENSITIVITY_NAME = "sensitivity.lines"
LOCK_NAME = "lock"


class PartialError(InputError):
    """What a stopped run has left cannot be gone on with as it was asked for. It stays as it is; the message says what to do with it."""


@dataclass(frozen=True)
class Finished:
    """A step whose tensors are on the disk; the other fields say up to where its shard is written."""

    step: str
    num_tensors: int
    end: int
    sha256: str
    sources: dict[str, str]


class Journal:
    """The journal of one partial directory."""

    def __init__(self, partial: Path) -> None:
        self.directory = partial / JOURNAL_NAME
        self._lock: int | None = None

    def lock(self, name: str = LOCK_NAME) -> None:
        """Keeps other processes out until unlock() or the end of this process; workers lock the shards that they write."""
        self._lock = os.open(self.directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.unlock()
            raise ResourceError(f"{self.directory.parent}: another mtpress is writing there; wait for it or choose another OUT") from None

    def is_held(self) -> bool:
        """Whether the lock of the directory is this one's, and the directory still has its name."""
        if self._lock is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._lock), (self.directory / LOCK_NAME).lstat())
        except OSError:
            return False

    def take_lock(self, other: "Journal") -> None:
        """The lock that another one holds, of what has this one's name by now, is this one's from now on."""
        self._lock, other._lock = other._lock, None

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, run: Mapping[str, Any]) -> None:
        """Says what this run is made of."""
        new = self.directory / f"{RUN_NAME}.new"  # a run that goes on must find the old one or this, never half of it
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_whole(file, json.dumps(run, indent=2, ensure_ascii=False).encode())
            os.fsync(file)
        finally:
            os.close(file)
        new.replace(self.directory / RUN_NAME)

    def refuse_other_run(self, run: Mapping[str, Any]) -> None:
        """InputError that names what differs, unless the journal's run is this one."""
        old = read_json_object(self.directory / RUN_NAME)
        different = difference(old, json.loads(json.dumps(run)))
        if different:
            raise InputError(
                f"--resume: {self.directory.parent} was begun with {different}; call it as it was begun, or delete it to start over"
            )

    def append(self, shard: str, finished: Finished) -> None:
        """Adds a line and waits until it is on the disk. A torn line is cut off first: only here, as others read while this is written."""
        file = os.open(self.directory / f"{shard}.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                os.ftruncate(file, os.pread(file, size, 0).rfind(b"\n") + 1)
            write_whole(file, json.dumps(asdict(finished)).encode() + b"\n")
            os.fdatasync(file)
        finally:
            os.close(file)

    def finished(self, shard: str) -> list[Finished]:
        """The finished steps of a shard, in order."""
        path = self.directory / f"{shard}.jsonl"
        if not path.exists():
            return []
        *lines, _ = path.read_bytes().split(b"\n")
        try:
            return [Finished(**json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            raise InputError(f"{path}: is not what mtpress wrote; delete {self.directory.parent} to start over") from None

    def num_finished(self) -> int:
        """Finished steps of all shards."""
        return sum(len(self.finished(path.name.removesuffix(".jsonl"))) for path in self.directory.glob("*.jsonl"))


def write_whole(file: int, data: bytes) -> None:
    """Writes all of it; OSError where the disk takes a part only."""
    if os.write(file, data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def difference(old: Any, new: Any, at: str = "") -> str | None:
    """The first entry in which two plain values differ, as "recipe rounding max, not gptq", or None where they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            found = difference(old.get(key), new.get(key), f"{at} {key}".strip())
            if found:
                return found
        return None
    return None if old == new else f"{at} {_shown(old)}, not {_shown(new)}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:24]}…"
