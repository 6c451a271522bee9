"""Rules on the record: every file is the one that was written."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mtpress.checkpoint import INDEX_NAME, read_json_object
from mtpress.errors import InputError
from mtpress.progress import Progress
from mtpress.record import RECORD_NAME
from mtpress.rules.rule import Problem, Rule, count


@dataclass
class HashRun:
    """File names by what came of them."""

    equal: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)


def recorded_hashes(path: Path) -> dict[str, str]:
    """output_sha256 of mtpress.json; InputError where there is none."""
    if not (path / RECORD_NAME).is_file():
        raise InputError(f"{path}: no {RECORD_NAME}, so no hashes to check; only checkpoints made by mtpress have them")
    recorded = read_json_object(path / RECORD_NAME).get("output_sha256")
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise InputError(f"{path / RECORD_NAME}: no output_sha256, so no hashes to check")
    if any(Path(name).name != name for name in recorded):
        raise InputError(f"{path / RECORD_NAME}: output_sha256 names a file outside the directory")
    return recorded


def hash_files(path: Path, *, silent: bool = False) -> HashRun:
    """Hashes every recorded file."""
    recorded = recorded_hashes(path)
    present = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    # The record cannot hold its own hash, and the index is written after it.
    found = HashRun(unrecorded=sorted(present.keys() - recorded.keys() - {RECORD_NAME, INDEX_NAME}))
    with Progress("hash", sum(present.get(name, 0) for name in recorded), silent=silent) as progress:
        for name, expected in sorted(recorded.items()):
            if name not in present:
                found.gone.append(name)
                continue
            with (path / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            (found.equal if digest == expected else found.changed).append(name)
            progress.advance(present[name], name[:24])
    return found


def file_changed(found: HashRun) -> Iterator[Problem]:
    if found.changed:
        yield Problem(f"{count(len(found.changed), 'file')} not the one that was written", tuple(found.changed))


def file_gone(found: HashRun) -> Iterator[Problem]:
    if found.gone:
        yield Problem(f"{count(len(found.gone), 'file')} of the record not there", tuple(found.gone))


def file_unrecorded(found: HashRun) -> Iterator[Problem]:
    if found.unrecorded:
        yield Problem(f"{count(len(found.unrecorded), 'file')} that the record does not name", tuple(found.unrecorded))


AGAIN = "fetch or make the checkpoint again"
RULES = (
    Rule("file-changed", "error", "A file's SHA-256 is not the one in mtpress.json: it was damaged or edited since.", AGAIN, file_changed),
    Rule("file-gone", "error", "A file that mtpress.json records is missing.", AGAIN, file_gone),
    Rule(
        "file-unrecorded",
        "note",
        "A file that mtpress.json does not record: it was added later.",
        "nothing needs to be done",
        file_unrecorded,
    ),
)
