"""What of a run is finished, so that the same command with --resume goes on where it stopped.

A directory `.mtpress-partial` in OUT.partial, small, and gone when the output gets its name:
    run.json             what the bytes of the output depend on: recipe, source files, calibration, versions
    SHARD.jsonl          one line for each finished step of a shard, in order:
                         {"step": "layer 7", "num_tensors": 96, "end": 1270874112, "sha256": "…", "sources": {…}, "states": {…},
                          "line": "…"}
                         num_tensors and end (bytes, header included) count from the start of the file, sha256 is of those
                         bytes, sources are digests of the stored matrices that the step has quantized, states the SHA-256 of the
                         samples behind its layer (models/hidden_states.py), line that of all before it in the line
    sensitivity.lines    recipes with a budget: what was measured before the first step (quantization/sensitivity.py)
    hidden-0…2.bin       hidden states of the samples at three layer boundaries (models/hidden_states.py)
    lock, SHARD.lock     held by the process that writes here, and by the worker that writes a shard
A line is appended only when all that it tells of is on the disk, so what it says holds after a kill or a power cut; a torn
last line counts as not written. In: steps as they finish. Out: what is finished, or how two runs differ.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mtpress.checkpoint.json_files import read_json_object
from mtpress.errors import InputError, ResourceError

JOURNAL_NAME = ".mtpress-partial"  # also says that mtpress may delete the directory it stands in
RUN_NAME = "run.json"
SENSITIVITY_NAME = "sensitivity.lines"
LOCK_NAME = "lock"
SHA256 = re.compile("[0-9a-f]{64}")


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
    states: dict[str, str] = field(default_factory=dict)


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
        try:
            old = read_json_object(self.directory / RUN_NAME)
        except InputError:
            path, partial = self.directory / RUN_NAME, self.directory.parent
            raise PartialError(f"--resume: {path}: is not what mtpress wrote; delete {partial} to start over") from None
        different = difference(old, json.loads(json.dumps(run)))
        if different:
            raise PartialError(
                f"--resume: {self.directory.parent} was begun with {different}; call it as it was begun, or delete it to start over"
            )

    def append(self, shard: str, finished: Finished) -> None:
        """Adds a line and waits until it is on the disk. A torn line is cut off first: only here, as others read while this is written."""
        file = os.open(self.directory / f"{shard}.jsonl", os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                os.ftruncate(file, os.pread(file, size, 0).rfind(b"\n") + 1)
            write_whole(file, signed_line(asdict(finished)))
            os.fdatasync(file)
        finally:
            os.close(file)

    def finished(self, shard: str) -> list[Finished]:
        """The finished steps of a shard, in order; PartialError where a line is not what mtpress wrote there."""
        path = self.directory / f"{shard}.jsonl"
        if not path.exists():
            return []
        try:
            *lines, _ = path.read_bytes().split(b"\n")
            steps = [_finished(line) for line in lines]
            for step, following in pairwise(steps):
                if step.num_tensors >= following.num_tensors or step.end >= following.end:
                    raise ValueError("out of order")
        except (OSError, ValueError, TypeError, RecursionError):
            raise PartialError(f"{path}: is not what mtpress wrote; delete {self.directory.parent} to start over") from None
        return steps

    def num_finished(self) -> int:
        """Finished steps of all shards."""
        return sum(len(self.finished(path.name.removesuffix(".jsonl"))) for path in self.directory.glob("*.jsonl"))


def _finished(line: bytes) -> Finished:
    """What a line says; ValueError or TypeError where it is none."""
    step = Finished(**said_by(line))
    counts, digests = (step.num_tensors, step.end), [step.sha256]
    for named in (step.sources, step.states):
        if not isinstance(named, dict):
            raise ValueError("no names")
        digests += named.values()
    if not (isinstance(step.step, str) and all(type(count) is int and count >= 0 for count in counts)):
        raise ValueError("no step")
    if not all(isinstance(digest, str) and SHA256.fullmatch(digest) for digest in digests):
        raise ValueError("no hash")
    return step


def signed_line(said: Mapping[str, Any]) -> bytes:
    """A line of a journal, with the SHA-256 of what it says in it."""
    return json.dumps({**said, "line": _sha256(said)}).encode() + b"\n"


def said_by(line: bytes) -> dict[str, Any]:
    """What such a line says; ValueError where it is no object, or was altered. One without a SHA-256 is believed."""
    said = json.loads(line)
    if not isinstance(said, dict) or said.pop("line", None) not in (None, _sha256(said)):
        raise ValueError("not as it was written")
    return said


def _sha256(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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
