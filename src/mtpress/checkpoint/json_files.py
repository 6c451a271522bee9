"""JSON and text files of a checkpoint, read with a limit on their size: no duplicate keys, no surprise in their encoding."""

import json
from pathlib import Path
from typing import Any

from mtpress.errors import InputError

MAX_JSON_BYTES = 25_000_000
MAX_TEXT_BYTES = 8_000_000  # of a chat template; merges.txt of the family has 2 MB


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file; InputError if it is missing, too large, not UTF-8, or not JSON without repeated keys."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: cannot be read (it is not a file)")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: larger than {MAX_JSON_BYTES // 1_000_000} MB, which no config or index is; is it the right file?")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({str(error)[:120]}); restore it from the source checkpoint") from None


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str | None:
    """The content of a text file; None where it is not UTF-8. InputError if it is too large, a pipe or a device, or cannot be read."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: cannot be read (it is not a file)")
        if path.stat().st_size > max_bytes:
            raise InputError(
                f"{path}: larger than {max_bytes // 1_000_000} MB, which no such file is; restore it from the source checkpoint"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        return None


def read_json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, holds a {type(content).__name__}")
    return content
