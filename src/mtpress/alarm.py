"""A clock that ends what runs too long in this process: Python code and regular expressions, which look at signals; no other C code.

In: seconds. Out: `TimeUp`. Leaves out: threads other than the main one, and a process whose SIGALRM is taken: there nothing is ended,
and `available` says so.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TimeUp(BaseException):
    """It ran too long. Not an Exception: Jinja's optimizer swallows those."""


def available() -> bool:
    return threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TimeUp inside the block after so many seconds, where it can."""
    if not available():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TimeUp

    signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
