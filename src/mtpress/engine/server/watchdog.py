"""Stops an engine before the host runs out of memory.

On machines whose GPU shares the host's memory (GB10, Jetson) an engine that takes too much does not fail: the machine swaps,
freezes and reboots (vllm#46307, vllm#56824). So a thread reads MemAvailable several times a second and, under a threshold, kills the
engine at once: a polite end would need memory too. Leaves out: the GPU's own memory where it has some; there an allocation fails
and says so.
"""

import threading
from collections.abc import Callable

INTERVAL_SECONDS = 0.2
LEAST_BYTES, LEAST_SHARE = 2 << 30, 0.04


def default_threshold(memory_bytes: int) -> int:
    """2 GiB or 4 % of the machine's memory, whichever is more."""
    return max(LEAST_BYTES, int(LEAST_SHARE * memory_bytes))


class Watchdog(threading.Thread):
    """Calls stop() once when available() falls under threshold_bytes; seen_bytes is then what it saw, and None before."""

    def __init__(self, threshold_bytes: int, available: Callable[[], int], stop: Callable[[], None]) -> None:
        super().__init__(name="mtpress-watchdog", daemon=True)
        self.threshold_bytes = threshold_bytes
        self.seen_bytes: int | None = None
        self._available, self._stop_engine = available, stop
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            available = self._available()
            if available < self.threshold_bytes:
                self.seen_bytes = available
                self._stop_engine()
                return

    def end(self) -> None:
        self._done.set()
