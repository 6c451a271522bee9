"""Rules on the record: every file is the one that was written."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mtpress.checkpoint.checkpoint import INDEX_NAME
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.record import RECORD_NAME
from mtpress.errors import InputError
from mtpress.progress import Progress
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count


@dataclass
class HashRun:
    """File names by what came of them. unverified: of them that have no hash, those that the stage always hashes; unhashed: weights that
    a stage took over unread."""

    equal: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    unhashed: list[str] = field(default_factory=list)
    unrecorded: list[str] = field(default_factory=list)


# What an engine computes with; every stage writes or copies these anew, and so hashes them.
REVISING = ("graft", "repair", "convert")
COMPUTING = {
    "config.json", "hf_quant_config.json", "quantization_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "video_preprocessor_config.json",
    "processor_config.json",
}  # fmt: skip


def recorded_hashes(path: Path) -> tuple[dict[str, str], bool]:
    """(output_sha256 of mtpress.json, whether the stage hashes every weight); InputError where there is none.

    Stages that change a finished checkpoint link shards unread: they have the hashes that its record had, or none.
    """
    if not (path / RECORD_NAME).is_file():
        raise InputError(f"{path}: no {RECORD_NAME}, so no hashes to check; only checkpoints made by mtpress have them")
    content = read_json_object(path / RECORD_NAME)
    recorded = content.get("output_sha256")
    if not isinstance(recorded, dict) or not all(isinstance(value, str) for value in recorded.values()):
        raise InputError(f"{path / RECORD_NAME}: no output_sha256, so no hashes to check")
    if any(Path(name).name != name for name in recorded):
        raise InputError(f"{path / RECORD_NAME}: output_sha256 names a file outside the directory")
    return recorded, content.get("stage") not in REVISING


def hash_files(path: Path, *, silent: bool = False) -> HashRun:
    """Hashes every recorded file."""
    recorded, whole = recorded_hashes(path)
    present = {file.name: file.stat().st_size for file in path.iterdir() if file.is_file()}
    # The record cannot hold its own hash, and the index is written after it.
    found = HashRun()
    for name in sorted(present.keys() - recorded.keys() - {RECORD_NAME, INDEX_NAME}):
        weights = name.endswith(".safetensors")
        if name in COMPUTING or (weights and (whole or not recorded)):
            found.unverified.append(name)
        else:
            (found.unhashed if weights else found.unrecorded).append(name)
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


def file_unverified(found: HashRun) -> Iterator[Problem]:
    if found.unverified:
        yield Problem(f"{count(len(found.unverified), 'file')} that the record has no hash of and must have", tuple(found.unverified))


def weights_unhashed(found: HashRun) -> Iterator[Problem]:
    if found.unhashed:
        yield Problem(f"{count(len(found.unhashed), 'file')} of weights that the record has no hash of", tuple(found.unhashed))


def file_unrecorded(found: HashRun) -> Iterator[Problem]:
    if found.unrecorded:
        yield Problem(f"{count(len(found.unrecorded), 'file')} that the record does not name", tuple(found.unrecorded))


AGAIN = "fetch or make the checkpoint again"
RULES = (
    Rule("file-changed", "error", "A file's SHA-256 is not the one in mtpress.json: it was damaged or edited since.", AGAIN, file_changed),
    Rule("file-gone", "error", "A file that mtpress.json records is missing.", AGAIN, file_gone),
    Rule(
        "file-unverified",
        "error",
        "A file that an engine computes with has no SHA-256 in mtpress.json, though the stage that wrote it hashes such files: it was "
        "added, or its hash was taken out.",
        AGAIN,
        file_unverified,
    ),
    Rule(
        "weights-unhashed",
        "warning",
        "Weights that were taken over unread, from a checkpoint whose record has no hash of them: nobody can tell whether they were "
        "altered.",
        "compare them with the source: mtpress check CKPT --base SRC",
        weights_unhashed,
    ),
    Rule(
        "file-unrecorded",
        "note",
        "A file that mtpress.json does not record: it was added later.",
        "nothing needs to be done",
        file_unrecorded,
    ),
)
