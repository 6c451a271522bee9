"""Rows of a Hub data set → rows of a calibration file: chat with its pictures in their places, or text.

In: what the `datasets` library gives for a row, pictures as its Image feature decodes them (PIL images) or stores them (bytes or a
path); or, for sets that keep pictures apart, file names that stand for members of `SUBSET/media/*.tar` beside the rows, as in
nvidia/Nemotron-VLM-Dataset-v2. Out: {"messages": …} or {"text": …}. Leaves out: opening pictures (chat/encoder.py), which rows are wanted
and how a set is reached (calibration/samples.py).
"""

import posixpath
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from mtpress.chat.messages import part_kind

TALKS = ("messages", "conversations", "conversation")
PICTURES = ("images", "image", "picture")
QUESTIONS = ("question", "query", "prompt", "instruction")
ANSWERS = ("answer", "answers", "response", "caption", "captions", "output")
TEXTS = ("text", "article", "content")
IMAGE_MARK = "<image>"  # where a picture stands in talks that are plain strings
ROLES = {"human": "user", "gpt": "assistant"}
NAMES_PER_SAMPLE, ROWS_PER_SAMPLE = 8, 400  # how far a set is searched for rows whose pictures are in the first archives


def calibration_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a calibration file; one that nothing is known of becomes {"text": None}, which check_row refuses."""
    pictures = [picture for picture in _listed(_first(row, PICTURES)) if picture is not None]
    talk = _first(row, TALKS)
    if isinstance(talk, list):
        messages = [_message(turn) for turn in talk]
        return {"messages": _with_pictures(messages, pictures)}
    if not pictures:
        return {"text": next((row[key] for key in TEXTS if isinstance(row.get(key), str)), None)}
    question, answer = (next(iter(_listed(_first(row, keys))), None) for keys in ((*QUESTIONS, *TEXTS), ANSWERS))
    messages = [{"role": "user", "content": str(question or "Describe the picture.")}]
    messages += [{"role": "assistant", "content": str(answer)}] if answer is not None else []
    return {"messages": _with_pictures(messages, pictures)}


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _message(turn: Any) -> Any:
    """A turn with role and content, whichever of the two usual pairs of names it has."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}


def _with_pictures(messages: list[Any], pictures: list[Any]) -> list[Any]:
    """The messages with the row's pictures in the image parts that hold none; those that are left over open the first user turn."""
    left = iter(pictures)
    placed = [_place(message, left) if isinstance(message, Mapping) else message for message in messages]
    if over := list(left):
        for i, message in enumerate(placed):
            if isinstance(message, Mapping) and message.get("role") == "user":
                placed[i] = {**message, "content": [*({"type": "image", "image": picture} for picture in over), *_parts(message)]}
                break
    return placed


def _place(message: Mapping[str, Any], left: Iterator[Any]) -> dict[str, Any]:
    parts: list[Any] = []
    for part in _parts(message):
        if part_kind(part) == "text" and IMAGE_MARK in part["text"]:
            before, *others = part["text"].split(IMAGE_MARK)
            parts.append({"type": "text", "text": before})
            for text in others:
                picture = next(left, None)
                parts.append({"type": "text", "text": IMAGE_MARK} if picture is None else {"type": "image", "image": picture})
                parts.append({"type": "text", "text": text})
        elif isinstance(part, Mapping) and part_kind(part) == "image" and part.get("image") is None and part.get("image_url") is None:
            picture = next(left, None)
            parts.append(part if picture is None else {"type": "image", "image": picture})
        else:
            parts.append(part)
    changed = isinstance(message.get("content"), list) or any(part_kind(part) == "image" for part in parts)
    return {**message, "content": parts} if changed else dict(message)


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return list(content) if isinstance(content, list) else [{"type": "text", "text": content}] if isinstance(content, str) else []


# --- pictures that lie in archives beside the rows ---


def file_names(row: Mapping[str, Any]) -> list[str]:
    """The pictures of a row's talk that are named and not held."""
    talk = _first(row, TALKS)
    turns = [turn for turn in talk if isinstance(turn, Mapping)] if isinstance(talk, list) else []
    sources = [part.get("image") for turn in turns for part in _parts(turn) if isinstance(part, Mapping) and part_kind(part) == "image"]
    return [source for source in sources if isinstance(source, str) and not source.startswith("data:")]


def from_archives(rows: Iterable[Mapping[str, Any]], files: Any, archives: Sequence[str], num_samples: int) -> list[dict[str, Any]]:
    """The first num_samples rows whose pictures all lie in the first members of the archives, with the pictures' bytes.

    files: an fsspec file system; of an archive only headers and the pictures that are wanted are read.
    """
    at: dict[str, tuple[str, int, int]] = {}  # name → archive, offset and length of its bytes
    for name, place in islice(_members(files, archives), NAMES_PER_SAMPLE * num_samples):
        at.setdefault(name, place)
    wanted = ({**row} for row in islice(rows, ROWS_PER_SAMPLE * num_samples) if (names := file_names(row)) and at.keys() >= {*names})
    return [_with_bytes(row, files, at) for row in islice(wanted, num_samples)]


def _members(files: Any, archives: Sequence[str]) -> Iterator[tuple[str, tuple[str, int, int]]]:
    for archive in archives:
        with files.open(archive, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name.removeprefix("./"), (archive, member.offset_data, member.size)


def _with_bytes(row: dict[str, Any], files: Any, at: Mapping[str, tuple[str, int, int]]) -> dict[str, Any]:
    def held(part: Any) -> Any:
        if not isinstance(part, Mapping) or not isinstance(part.get("image"), str) or part["image"] not in at:
            return part
        archive, offset, size = at[part["image"]]
        with files.open(archive, "rb") as file:
            file.seek(offset)
            return {"type": "image", "image": {"bytes": file.read(size), "path": posixpath.basename(part["image"])}}

    key = next(key for key in TALKS if row.get(key) is not None)
    turns = [
        {**turn, "content": [held(p) for p in turn["content"]]} if isinstance(turn.get("content"), list) else turn for turn in row[key]
    ]
    return {**row, key: turns}
