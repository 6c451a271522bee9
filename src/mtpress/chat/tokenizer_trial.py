"""A stranger's tokenizer, loaded and tried in a process of its own: a normalizer may grow its text without end, an expression may not
end, and what its library panics at ends a process.

In: a tokenizer.json. Out: nothing, or an InputError. Leaves out: whether it is the right one (rules/tokenizer.py). What is tried is a text
of every kind of letter and of every string that the normalizer and the pre-tokenizer look for.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from mtpress.checkpoint.json_files import MAX_JSON_BYTES, MAX_TEXT_BYTES, read_json
from mtpress.confined import Confined, TooLargeError, TooLongError
from mtpress.errors import InputError

MAX_SECONDS, MAX_BYTES = 20.0, 3_000_000_000  # Qwen's takes half a second and 300 MB
MAX_GROWTH = 64  # tokens a character: a letter has 4 bytes in UTF-8, and 18 letters in the widest composition
MAX_PROBE_CHARS = 20_000
FILES = {"tokenizer.json": MAX_JSON_BYTES, "vocab.json": MAX_JSON_BYTES, "added_tokens.json": MAX_JSON_BYTES, "merges.txt": MAX_TEXT_BYTES}
PROBE = (
    "".join(map(chr, range(32, 127)))
    + " " * 64
    + "a" * 256
    + "1" * 64
    + "\n\t\r\n"
    + "äöüß ÀÉ ﷺ ﬁ ½ 日本語 한국어 العربية עברית हिन्दी 🙂🏽 e\u0301\u0323 \u200d"
)

_process = Confined(__name__, MAX_BYTES)


def refuse_hostile(directory: Path) -> None:
    """InputError for tokenizer files that are too large, no files, or do harm."""
    for name, most in FILES.items():
        path = directory / name
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: cannot be read (it is not a file)")
        if path.exists() and (size := path.stat().st_size) > most:
            raise InputError(
                f"{path}: {size / 1e6:,.0f} MB, over {most // 1_000_000}; its tokenizer does not load, restore it from the source"
            )
    if (directory / "tokenizer.json").exists():
        path = (directory / "tokenizer.json").resolve()
        _try(path, path.stat().st_mtime_ns)


@cache
def _try(path: Path, changed_ns: int) -> None:
    try:
        _process.ask(str(path), MAX_SECONDS)
    except TooLongError:
        raise InputError(
            f"{path}: its tokenizer does not load: a short text takes over {MAX_SECONDS:.0f} s; check tokenizer.json"
        ) from None
    except TooLargeError:
        raise InputError(f"{path}: its tokenizer does not load: a short text ends its process; check tokenizer.json") from None
    except ValueError as error:
        raise InputError(f"{path}: its tokenizer does not load ({str(error)[:160]}); check tokenizer.json") from None


def prepare() -> None:
    """Imports the library, which is not the tokenizer's time."""
    import tokenizers  # noqa: F401


def answer(path: str) -> int:
    """What the process of its own is asked: tokens of the probe."""
    from tokenizers import Tokenizer

    content = read_json(Path(path))
    tokenizer = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    parts = [content.get(part) for part in ("normalizer", "pre_tokenizer")] if isinstance(content, dict) else []
    probe = (PROBE + " ".join(_strings(parts)))[:MAX_PROBE_CHARS]
    found = len(tokenizer.encode(probe, add_special_tokens=False).ids)
    if found > MAX_GROWTH * len(probe):
        raise ValueError(f"it makes {found:,} tokens of {len(probe):,} characters")
    return found


def _strings(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _strings(inner)
