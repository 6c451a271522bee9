"""Notices a source that changes while it is read.

In: an open checkpoint. Out: what its files are like (size, modification time, SHA-256 of the header), and an InputError as
soon as one of them is no longer so.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError


class SourceGuard:
    """Takes the fingerprints when it is made; look() is cheap enough for every step, look_closely() reads the headers again."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.data_starts = {shard.path: min((info.offset for info in shard.tensors), default=0) for shard in checkpoint.shards}
        self.stats = {path: _stat(path) for path in self.data_starts}
        self.headers = {path: self._header(path) for path in self.data_starts}

    def fingerprints(self) -> dict[str, Any]:
        """File name → size in bytes, modification time in ns, SHA-256 of the header."""
        return {
            path.name: {"size": size, "mtime_ns": mtime_ns, "header_sha256": self.headers[path]}
            for path, (size, mtime_ns) in self.stats.items()
        }

    def look(self, files: Iterable[Path]) -> None:
        """InputError if one of these files is not what it was when the run began, by size and modification time."""
        for file in files:
            now = _stat(file)
            if now != self.stats[file]:
                what = "size" if now[0] != self.stats[file][0] else "modification time"
                raise InputError(f"{file}: its {what} changed while it was read; start over from a source that stays as it is")

    def look_closely(self) -> None:
        """InputError if any file has changed, its header included."""
        self.look(self.stats)
        for path, header in self.headers.items():
            if self._header(path) != header:
                raise InputError(f"{path}: its header changed while it was read; start over from a source that stays as it is")

    def _header(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                return hashlib.sha256(file.read(self.data_starts[path])).hexdigest()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); it was there when the run began") from None
    return found.st_size, found.st_mtime_ns
