"""SHA-256 of files in the background, while the main work reads the same files.

In: paths. Out: name → hex digest, when asked for. One thread reads each file once from start to end, so that the pages
it brings in serve the stream that reads the same tensors in another order.
"""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from mtpress.errors import InputError

PIECE_BYTES = 16 << 20


class FileHasher:
    """Context manager; results() waits for the thread, leaving early stops it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._found: dict[str, str] = {}
        self._failure: OSError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._hash, name="mtpress-hash", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def results(self) -> dict[str, str]:
        """File name → SHA-256 in hexadecimal."""
        self._thread.join()
        if self._failure is not None:
            raise InputError(f"{self._failure.filename}: cannot be read ({self._failure.strerror})") from None
        return self._found

    def _hash(self) -> None:
        buffer = bytearray(PIECE_BYTES)
        view = memoryview(buffer)
        try:
            for path in self.paths:
                digest = hashlib.sha256()
                with path.open("rb", buffering=0) as file:
                    while (count := file.readinto(buffer)) and not self._stop.is_set():
                        digest.update(view[:count])
                self._found[path.name] = digest.hexdigest()
                if self._stop.is_set():
                    return
        except OSError as error:
            self._failure = error
