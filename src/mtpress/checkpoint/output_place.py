"""Whether an output can stand where it is to, found out before anything else is done.

In: the path of an output, and the directories that it is made from. Out: nothing, or what is in the way, as an error. Leaves out:
whether there is room (quantization/preflight.py), and the directory that is written first (checkpoint/partial_directory.py).
"""

import os
from collections.abc import Iterable
from pathlib import Path

from mtpress.checkpoint.partial_directory import PARTIAL_SUFFIX, PartialDirectory
from mtpress.errors import InputError, ResourceError

MAX_NAME_BYTES = 255  # of every file system that Linux has
MAX_PATH_BYTES = 4096 - 160  # what is written below it has a name too


def refuse_place(out: Path, sources: Iterable[str | Path] = (), *, finished: bool = False) -> None:
    """InputError where `out` cannot become an output, or it or OUT.partial is, holds or lies in a directory that it is made from;
    ResourceError where its place may not be written.

    sources: those that are no directories, as Hub ids, count for nothing. finished: `out` may be there, for a run that goes on.
    """
    _refuse_name(out)
    if out.is_symlink() and not out.exists():
        raise InputError(f"{out}: is a link to {out.readlink()}, which is not there; remove it or name another directory")
    if os.path.lexists(out) and not finished:
        raise InputError(f"{out}: exists already; name a directory that does not")
    _refuse_sources(out, sources)
    if not os.path.lexists(out):
        PartialDirectory(out).refuse_foreign()
        _refuse_parent(out)


def _refuse_name(out: Path) -> None:
    """InputError where no directory could have this name, or none that a record and a command line can hold."""
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise InputError(f"{out}: its name is not UTF-8, which the record of an output must be; name another directory") from None
    if out.name in ("", "..") or "\0" in str(out):
        raise InputError(f"{out}: is no name for a new directory; name one that does not exist")
    names = [*out.absolute().parts[:-1], out.name + PARTIAL_SUFFIX]
    longest = max(len(os.fsencode(name)) for name in names)
    if longest > MAX_NAME_BYTES or len(os.fsencode(out.absolute())) > MAX_PATH_BYTES:
        raise InputError(f"{out}: is too long a name, with {PARTIAL_SUFFIX} behind it; name another directory")


def _refuse_sources(out: Path, sources: Iterable[str | Path]) -> None:
    """InputError where writing OUT.partial or OUT would change what it is made from."""
    place, partial = (Path(os.path.realpath(path)) for path in (out, PartialDirectory(out).path))
    for source in map(Path, sources):
        if not source.is_dir():
            continue
        read = Path(os.path.realpath(source))
        if read in place.parents:
            raise InputError(f"{out}: lies inside {source}, which is not to be changed; name a directory elsewhere")
        if partial == read or partial in read.parents:
            raise InputError(f"{source}: has the name that {out} is written under; rename it or name another directory")


def _refuse_parent(out: Path) -> None:
    """ResourceError where the directory that OUT is to be made in is none, or may not be written."""
    parent = out.absolute().parent
    while not os.path.lexists(parent):  # one that may not be entered seems to hold nothing
        parent = parent.parent
    if not parent.is_dir():
        raise ResourceError(f"{out}: cannot be written ({parent} is not a directory); name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ResourceError(f"{out}: cannot be written (this user may not write in {parent}); name another place")
