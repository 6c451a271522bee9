"""The command `mtpress`, from its first instruction: Ctrl-C ends it without a word until the command line is there to answer.

In: the arguments of the process. Out: its exit code. Leaves out: everything else (cli.py), which takes long enough to import for a
Ctrl-C to fall into it. Imports nothing that Python has not loaded by then: `signal` alone would load enum.
"""

import _signal  # type: ignore[import-not-found]
import os


def entry() -> None:
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:  # nohup's choice stands
        _signal.signal(_signal.SIGINT, _leave)
    from mtpress import cli

    cli.entry()


def _leave(number: int, frame: object) -> None:
    os._exit(128 + number)
