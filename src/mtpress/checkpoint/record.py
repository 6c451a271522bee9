"""mtpress.json: what made a checkpoint, so that anyone can make it again and check it.

In: what a stage knows (recipe, source, calibration, timings). Out: the record beside the weights. Keys are the words of
the command line; times in seconds, sizes in bytes.
"""

import platform
import resource
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from mtpress import __version__
from mtpress.api_key import without_secrets
from mtpress.checkpoint.json_files import read_json_object
from mtpress.errors import InputError
from mtpress.json_files import json_bytes

RECORD_NAME = "mtpress.json"
RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    return {"mtpress": __version__, "python": platform.python_version(), **{p: metadata.version(p) for p in RECORDED_PACKAGES}}


def command_line() -> str:
    """The command as it was typed, without secrets; a Python caller is recorded as such."""
    if sys.argv and sys.argv[0].rsplit("/", 1)[-1] in ("mtpress", "__main__.py"):
        return shlex.join(["mtpress", *without_secrets(sys.argv[1:])])
    return "python"


def record_bytes(stage: str, **entries: Any) -> bytes:
    """The record of one stage as the content of mtpress.json."""
    content = {"stage": stage, "command": command_line(), "versions": versions(), **entries}
    return json_bytes(content)


def add_to_record(directory: Path, **entries: Any) -> bool:
    """Adds what was learned of a finished checkpoint to its mtpress.json, in one step; False where it has none or cannot be written."""
    path = directory / RECORD_NAME
    partial = path.with_name(f".{RECORD_NAME}.partial")
    try:
        content = read_json_object(path) | entries
        partial.write_bytes(json_bytes(content))
        partial.replace(path)
    except (OSError, ValueError, TypeError, InputError):
        partial.unlink(missing_ok=True)
        return False
    return True
