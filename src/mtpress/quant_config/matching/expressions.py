"""Regular expressions that stand in a config: Python's, as vLLM compiles them, within a budget of time.

In: an expression, a name. Out: whether it matches. One that is none, or that runs beyond its budget, matches nothing, and the rules say so:
vLLM would not start with the one, and not end with the other. Leaves out: what an entry of a config means (the other files here).

The budget is held by a signal, which re looks at while it goes back and forth. Where there is none (another thread) a process of its own
is asked (confined.py).
"""

import re
import time
from functools import lru_cache
from typing import Literal

from mtpress.alarm import TimeUp, alarm, available
from mtpress.confined import Confined, TooLargeError, TooLongError

MAX_SECONDS = 1.0  # of one expression on all names together; sound ones take microseconds
MAX_ALL_SECONDS = 5.0  # of all expressions
QUICK_SECONDS = 0.001  # not worth the book-keeping
REPEATS = re.compile(r"[*+?{]")  # without one of these an expression cannot go back
MAX_BYTES = 1 << 30
How = Literal["match", "search"]

_spent: dict[str, float] = {}
_endless: set[str] = set()
_process = Confined(__name__, MAX_BYTES)


@lru_cache(maxsize=4096)
def is_expression(text: str) -> bool:
    """Whether it compiles. One that takes too long to compile is none."""
    try:
        with alarm(MAX_SECONDS):
            re.compile(text)
    except (re.error, OverflowError, RecursionError, TimeUp):
        return False
    return True


def matches(text: str, name: str, how: How = "match") -> bool:
    """What re.match or re.search says of a name; False for what is no expression and from where its budget is spent."""
    if not is_expression(text):
        return False
    if not REPEATS.search(text):
        return getattr(re, how)(text, name) is not None
    left = min(MAX_SECONDS - _spent.get(text, 0.0), MAX_ALL_SECONDS - sum(_spent.values()))
    if left <= 0:
        _endless.add(text)
        return False
    started = time.perf_counter()
    try:
        return _matched(text, name, how, left)
    except (TimeUp, TooLongError, TooLargeError, MemoryError):
        _endless.add(text)
        return False
    finally:
        if (seconds := time.perf_counter() - started) > QUICK_SECONDS:
            _spent[text] = _spent.get(text, 0.0) + seconds


def _matched(text: str, name: str, how: How, seconds: float) -> bool:
    if not available():
        return bool(_process.ask([text, name, how], seconds))
    with alarm(seconds):
        return getattr(re, how)(text, name) is not None


def answer(request: tuple[str, str, How]) -> bool:
    """What the process of its own is asked: expression, name, how."""
    text, name, how = request
    return getattr(re, how)(text, name) is not None


def is_endless(text: str) -> bool:
    """Whether it ran beyond the budget so far."""
    return text in _endless
