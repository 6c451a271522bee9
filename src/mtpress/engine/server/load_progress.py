"""Progress of an engine that loads: its stage, seconds, memory. A live line on a terminal, a line for each stage elsewhere.

In: the lines of its log. Leaves out: how long it will take; an engine's stages are of different kinds and say nothing of one another.
"""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from mtpress.engine.server.engine_log import stage
from mtpress.progress import human_bytes, human_seconds
from mtpress.terminal import visible

STILL_SECONDS = 15.0  # without a terminal: how long a stage may last before it is told again


class LoadProgress:
    """memory_bytes: what the engine takes now. say: gets whole lines; None writes to the stream."""

    def __init__(self, memory_bytes: Callable[[], int], *, say: Callable[[str], None] | None = None, stream: TextIO | None = None) -> None:
        self.stage = "starting"
        self._memory, self._stream = memory_bytes, stream or sys.stderr
        self._live = say is None and self._stream.isatty()
        self._say = say or self._print
        self._started = self._told_at = time.monotonic()
        self._told = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._write("\r\x1b[2K")

    def see(self, line: str) -> None:
        """A line of the log."""
        self.stage = stage(line) or self.stage

    def show(self) -> None:
        now = time.monotonic()
        if self._live:
            self._write(f"\r\x1b[2K{self._line(now)}")
        elif self.stage != self._told or now - self._told_at >= STILL_SECONDS:
            self._say(self._line(now))
            self._told, self._told_at = self.stage, now

    def ready(self, seconds: float) -> None:
        if self._live:
            self._write("\r\x1b[2K")
        self._say(f"engine  ready in {human_seconds(seconds)}  RAM {human_bytes(self._memory())}")

    def _line(self, now: float) -> str:
        return f"engine  {visible(self.stage):<44}  {human_seconds(now - self._started)}  RAM {human_bytes(self._memory())}"

    def _print(self, line: str) -> None:
        self._write(line + "\n")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone; the work is not
            self._live, self._say = False, lambda line: None
