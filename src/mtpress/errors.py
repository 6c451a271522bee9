"""What can go wrong, as exceptions, and the exit code each one means.

    MtpressError            shown as one line, never with a traceback
    ├── InputError     2    a file, a checkpoint, a recipe or an argument is not what it must be
    ├── ResourceError  2    the machine cannot do it: memory, disk, a missing device
    ├── EngineError    2    the serving engine did not come up, died, or was stopped before it took the machine down
    └── FindingError   1    the work ran, and what it was to prove is not so

A signal ends with 128 + its number: Ctrl-C with 130. What the system refuses (OSError, MemoryError) is told in the words of
of_the_machine() where nobody had better ones. Anything else that escapes is a bug of ours and keeps its traceback.
A message says what, where and what to try, on one line.
"""

import errno

WHAT_TO_TRY = {
    errno.EACCES: "this user may not read, enter or write there: change the permissions, or name another place",
    errno.EPERM: "this user may not do that: change the permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "its links lead in a circle; name the file itself",
    errno.ENOENT: "name one that is there",
    errno.ENOTDIR: "name a directory",
    errno.EISDIR: "name a file",
    errno.ENOSPC: "free space or choose another disk",
    errno.EDQUOT: "free space or choose another disk",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or end some",
}
# What torch says where an allocation fails; it has no class of its own for it on a CPU.
NO_MEMORY = (
    "can't allocate memory",
    "bad_alloc",
    "cannot allocate memory",
    "can't start new thread",
    "failed to map segment",
    "out of memory",
)
MORE_MEMORY = "free some, raise the limit (ulimit -v), or take fewer --workers"


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


def of_the_machine(error: BaseException) -> str | None:
    """What to say of an exception by which the system refused something; None for any other, which is a bug of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, ImportError)) and any(w in text.lower() for w in NO_MEMORY)):
        return f"there is not enough memory ({text[:160] or 'an allocation failed'}); {MORE_MEMORY}"
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"{error.object[:200]}: is not UTF-8; rename it"
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if "temporary directory" in text:
        return f"{error.strerror}; set TMPDIR to a directory that can be written"
    if error.errno == errno.ENOMEM:
        return f"there is not enough memory ({text[:160]}); {MORE_MEMORY}"
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror or text}; {WHAT_TO_TRY.get(error.errno, 'look at what is there')}"
