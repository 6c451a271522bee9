"""Progress of long work on stderr: done, rate, time left, memory. A live line on a terminal, a plain line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

import psutil

from mtpress.terminal import visible

PLAIN_SECONDS = 10.0
LIVE_SECONDS = 0.1


def human_bytes(count: float) -> str:
    """1_234_567 → "1.23 MB" (powers of ten, as disks and model cards count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def human_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class Progress:
    """Counts work of known size. Context manager; silent=True prints nothing."""

    def __init__(self, label: str, total: float, *, unit: str = "B", silent: bool = False, stream: TextIO | None = None) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.silent, self.stream = silent, stream or sys.stderr
        self.live = self.stream.isatty()
        self.done, self.note = 0.0, ""
        self.told = 0.0  # what was done when a line was last written
        self.started = self.shown = time.monotonic()
        self.process = psutil.Process()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.silent or not self.done:
            return
        if self.live or (kind is None and self.told < self.done):
            self._show(end="\n")

    def skip(self, amount: float) -> None:
        """Takes away work that is done already; rate and time left are those of what remains."""
        self.total -= amount

    def say(self, text: str) -> None:
        """One line of its own."""
        if not self.silent:
            self._write(visible(f"{self.label}  {text}") + "\n")

    def advance(self, amount: float, note: str = "") -> None:
        self.done += amount
        self.note = note or self.note
        now = time.monotonic()
        if not self.silent and now - self.shown >= (LIVE_SECONDS if self.live else PLAIN_SECONDS):
            self.shown = now
            self._show(end="" if self.live else "\n")

    def _show(self, end: str) -> None:
        self.told = self.done
        seconds = max(time.monotonic() - self.started, 1e-6)
        rate = self.done / seconds
        left = (self.total - self.done) / rate if rate and self.total > self.done else 0.0
        amount = f"{human_bytes(rate)}/s" if self.unit == "B" else f"{rate:{',.0f' if rate >= 10 else '.2g'}} {self.unit}/s"
        share = min(self.done / self.total, 1.0) if self.total else 1.0
        timing = f"{human_seconds(left)} left" if share < 1 else f"in {seconds:.1f} s"
        memory = human_bytes(self.process.memory_info().rss)
        text = f"{self.label}  {share:4.0%}  {self.note:<24} {amount}  {timing}  RAM {memory}"
        start = "\r\x1b[2K" if self.live else ""
        self._write(start + visible(text) + end)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # the terminal is gone; the work is not
            self.silent = True
