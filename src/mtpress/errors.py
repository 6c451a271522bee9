"""What can go wrong, as exceptions, and the exit code each one means.

    MtpressError            shown as one line, never with a traceback
    ├── InputError     2    a file, a checkpoint, a recipe or an argument is not what it must be
    ├── ResourceError  2    the machine cannot do it: memory, disk, a missing device
    ├── EngineError    2    the serving engine did not come up, died, or was stopped before it took the machine down
    └── FindingError   1    the work ran, and what it was to prove is not so

A signal ends with 128 + its number: Ctrl-C with 130. Anything else that escapes is a bug of ours and keeps its traceback.
A message says what, where and what to try, on one line.
"""


class MtpressError(Exception):
    """A failure that the user can act on."""

    exit_code = 2

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class InputError(MtpressError):
    """Something handed to mtpress is not what it must be."""


class ResourceError(MtpressError):
    """The machine lacks what the work needs."""


class EngineError(MtpressError):
    """The serving engine did not come up, or is no longer there."""


class FindingError(MtpressError):
    """The work ran and found something wrong."""

    exit_code = 1
