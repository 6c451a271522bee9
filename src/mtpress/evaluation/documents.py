"""The documents that eval measures on, and whether a checkpoint has been calibrated on one of them.

In: JSON-lines files as quantize reads them, or the sets that ship with mtpress. Out: `Documents`: encoded samples with the set that
each is of, and the positions whose prediction counts. Leaves out: what the models make of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtpress.builtin import EVALUATION_FILE, EVALUATION_IMAGES_FILE
from mtpress.calibration.samples import BUILTIN, BUILTIN_SETS, encode_row, load_calibration, read_jsonl
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.images import open_image
from mtpress.chat.messages import part_kind
from mtpress.chat.sample import Sample
from mtpress.chat.template import template
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.json_files import read_json_object
from mtpress.checkpoint.record import RECORD_NAME
from mtpress.errors import InputError
from mtpress.plan.recipe import parse_recipe

ALL, TEXT, IMAGES = "all", "text", "with images"
MIN_TOKENS = 2  # one to predict


@dataclass
class Documents:
    """Samples in order. sets: the name of the set that each is of; keys: what tells its content apart from another's.

    counted: for each, bool [T − 1]: whether the prediction of the token behind position t counts; those of image placeholders do not.
    """

    samples: list[Sample] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    counted: list[Tensor] = field(default_factory=list)
    with_images: list[bool] = field(default_factory=list)
    num_truncated: int = 0

    @property
    def lengths(self) -> list[int]:
        return [len(sample.input_ids) for sample in self.samples]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    def groups(self) -> dict[str, list[int]]:
        """Name → the documents that are reported together: all, each set, and text apart from pictures where there are both."""
        found = {ALL: list(range(len(self.samples)))}
        names = list(dict.fromkeys(self.sets))
        if len(names) > 1:
            found |= {name: [i for i, of in enumerate(self.sets) if of == name] for name in names}
        if len(set(self.with_images)) > 1:
            found[TEXT] = [i for i, seen in enumerate(self.with_images) if not seen]
            found[IMAGES] = [i for i, seen in enumerate(self.with_images) if seen]
        return found

    def sizes(self) -> dict[str, dict[str, int]]:
        """Set → how many documents and tokens."""
        found = {name: {"num_documents": 0, "num_tokens": 0} for name in self.sets}
        for name, length in zip(self.sets, self.lengths, strict=True):
            found[name]["num_documents"] += 1
            found[name]["num_tokens"] += length
        return found

    def sha256(self) -> str:
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()


def builtin_sets() -> dict[str, Path]:
    """The evaluation sets that ship with mtpress, by the name they are reported under."""
    return {BUILTIN: EVALUATION_FILE, f"{BUILTIN}-images": EVALUATION_IMAGES_FILE}


def _files(data: Sequence[str]) -> dict[str, Path]:
    """Name of a set → its file; names are those of the files, without what all have in common."""
    found: dict[str, Path] = {}
    for given in data or (BUILTIN,):
        for name, path in (builtin_sets() if given == BUILTIN else {Path(given).stem: Path(given)}).items():
            unique = name if name not in found else str(path)
            if path in found.values():
                raise InputError(f"--data {given}: named twice; name each set once")
            found[unique] = path
    return found


def load(encoder: ChatEncoder, config: Mapping[str, Any], data: Sequence[str], max_seq_len: int, limit: int | None = None) -> Documents:
    """Reads and encodes the sets. limit: at most so many documents of each. Texts are cut at max_seq_len tokens, pictures are not."""
    documents = Documents()
    placeholders = torch.tensor([config[key] for key in ("image_token_id", "video_token_id") if isinstance(config.get(key), int)])
    for name, path in _files(data).items():
        first = len(documents.samples)
        for where, row in read_jsonl(path):
            if limit is not None and len(documents.samples) - first == limit:
                break
            sample = encode_row(encoder, row, where)
            with_images = sample.has_pictures
            if len(sample.input_ids) > max_seq_len:
                if with_images:
                    raise InputError(f"{where}: {len(sample.input_ids)} tokens with pictures, over --max-seq-len {max_seq_len}; raise it")
                sample.input_ids = sample.input_ids[:max_seq_len]
                documents.num_truncated += 1
            if len(sample.input_ids) < MIN_TOKENS:
                continue
            documents.samples.append(sample)
            documents.sets.append(name)
            documents.keys.append(content_key(row, where))
            documents.counted.append(~torch.isin(sample.input_ids[1:], placeholders))
            documents.with_images.append(with_images)
        if len(documents.samples) == first:
            raise InputError(f"{path}: holds no document of {MIN_TOKENS} tokens or more")
    return documents


def content_key(row: Mapping[str, Any], where: str) -> str:
    """SHA-256 of what a row says, whatever template renders it and however it names its pictures."""
    if "messages" not in row:
        return _digest(row["text"].strip())
    turns = []
    for message in row["messages"]:
        content = message.get("content")
        turns.append([message.get("role"), [_part(p, where) for p in content] if isinstance(content, list) else [content]])
        turns.append(message.get("tool_calls"))
    return _digest(json.dumps(turns, sort_keys=True))


def _part(part: Mapping[str, Any], where: str) -> str:
    kind = part_kind(part)
    if kind == "image":
        picture = open_image(part["image"] if part.get("image") is not None else part.get("image_url"), where)
        return f"{picture.size} {hashlib.sha256(picture.tobytes()).hexdigest()}"
    return str(part.get("text")) if kind == "text" else json.dumps(part, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Disjointness:
    """What was compared with the documents. checked: each set of samples; shared: documents that are in one of them.

    known: whether one of the sets is, by its SHA-256, what mtpress.json says that the checkpoint was calibrated on; None where it
    was not calibrated. said: in one sentence.
    """

    checked: tuple[str, ...]
    shared: int
    known: bool | None
    said: str


def check_disjoint(documents: Documents, checkpoint: Checkpoint, calibration: Sequence[str]) -> Disjointness:
    """Whether a document is in the built-in calibration sets or the files given, and whether the checkpoint was made with one of them."""
    files = {name: paths[0] for name, paths in BUILTIN_SETS.items() if len(paths) == 1} | {name: Path(name) for name in calibration}
    mine = set(documents.keys)
    per_file = {name: sum(content_key(row, where) in mine for where, row in read_jsonl(path)) for name, path in files.items()}
    shared, names = sum(per_file.values()), ", ".join(files)
    found = f"{shared} of {len(mine)} documents are in {names}" if shared else f"no document is in {names}"
    path = checkpoint.path / RECORD_NAME
    record = read_json_object(path) if path.is_file() else {}
    made_with = record.get("calibration")
    if record.get("stage") == "quantize" and (not isinstance(made_with, dict) or "sha256" not in made_with):
        return Disjointness(tuple(files), shared, None, f"{found}; it was made without samples")
    if not isinstance(made_with, dict) or "sha256" not in made_with:
        said = "what it was calibrated on is not recorded: name it with --calibration FILE.jsonl"
        return Disjointness(tuple(files), shared, False, f"{found}; {said}")
    match = next((name for name in _candidates(calibration) if _identity(checkpoint, record, name) == made_with["sha256"]), None)
    if match is None:
        said = f"it was calibrated on {str(made_with.get('source'))[:60]!r}, which is none of these: name it with --calibration FILE.jsonl"
        return Disjointness(tuple(files), shared, False, f"{found}; {said}")
    which = f"{BUILTIN} set" if match == (BUILTIN,) else ", ".join(match)
    return Disjointness(tuple(files), shared, True, f"{found}; by its SHA-256 the {which} is what it was calibrated on")


def _candidates(calibration: Sequence[str]) -> list[tuple[str, ...]]:
    """The lists of --calibration that may have made a checkpoint: each built-in set, each file alone, and all as given."""
    return list(dict.fromkeys([*((name,) for name in (*BUILTIN_SETS, *calibration)), *([tuple(calibration)] if calibration else [])]))


def _identity(checkpoint: Checkpoint, record: Mapping[str, Any], files: tuple[str, ...]) -> str | None:
    """The SHA-256 that quantize would record for these files under the checkpoint's recipe; None where it cannot be told."""
    try:
        recipe = parse_recipe(record["recipe"], RECORD_NAME)
        ours = record.get("chat_template", recipe.chat_template) == "mtpress"  # the source's own may have been kept
        rendered = template() if ours else None
        return load_calibration(checkpoint.path, recipe.calibration, files, rendered).identity
    except (InputError, KeyError, TypeError, AttributeError):
        return None
