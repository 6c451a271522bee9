"""The one writer of JSON: files of a checkpoint, records, results.

In: plain data. Out: its text or bytes. JSON has no NaN and no infinity, and most readers stop at them: they become null.
"""

import json
from collections.abc import Mapping
from math import isfinite
from typing import Any


def json_string(content: Any, *, indent: int | None = None) -> str:
    """Text of JSON; what is no plain data is spelled by str()."""
    try:
        return json.dumps(content, indent=indent, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(content), indent=indent, ensure_ascii=False, default=str, allow_nan=False)


def json_bytes(content: Any, *, indent: int = 2) -> bytes:
    """A JSON file as mtpress writes them; a path in it need not be UTF-8."""
    return (json_string(content, indent=indent) + "\n").encode(errors="backslashreplace")


def without_nan(content: Any) -> Any:
    """The same with null for every number that is none."""
    if isinstance(content, float):
        return content if isfinite(content) else None
    if isinstance(content, Mapping):
        return {key if isinstance(key, str | int) or key is None else str(key): without_nan(value) for key, value in content.items()}
    return [without_nan(value) for value in content] if isinstance(content, list | tuple) else content


SHOWN = 60


def shown(value: Any) -> str:
    """A value in a few characters of JSON."""
    return json.dumps(value, ensure_ascii=False, default=str)[:SHOWN]
