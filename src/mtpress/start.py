"""The command `mtpress`, from its first instruction: Ctrl-C ends it without a word until the command line is there to answer.

In: the arguments of the process. Out: its exit code. Leaves out: everything else (cli.py), which takes long enough to import for a
Ctrl-C to fall into it.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def entry() -> NoReturn:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup's choice stands
        signal.signal(signal.SIGINT, _leave)
    from mtpress import cli

    cli.entry()


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def open_streams() -> None:
    """Puts /dev/null in the place of a closed stdin or stderr, so that no file of ours gets its number, and what others write there.

    A closed stdout ends the command here, with a line: what it is to find could be told to nobody.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for number in closed:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if number == 2:
            sys.stderr = os.fdopen(2, "w", closefd=False)
    if 1 in closed:
        sys.stderr.write("mtpress: stdout is closed, and the result goes there; send it to a file, or to /dev/null\n")
        sys.stderr.flush()
        os._exit(2)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
