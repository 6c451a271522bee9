"""OUT.partial, the directory that a run writes into: who may make it, take it over, and remove it.

In: the name of an output. Out: the directory, held by a lock that ends with this process. Leaves out: what is written there
(checkpoint/writer.py), what its journal says (checkpoint/journal.py), and whether OUT may stand where it is to
(checkpoint/output_place.py).

Nothing in it is made or removed but under the lock. It gets its name with its mark and its lock in it, by a rename, so no other
run ever sees it unmarked; it loses its name, emptied, by another. A process that waited at the lock of a directory which is gone
by then notices that the lock it got has no name any more.
"""

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from mtpress.checkpoint.journal import JOURNAL_NAME, LOCK_NAME, Journal
from mtpress.errors import InputError, ResourceError

PARTIAL_SUFFIX = ".partial"
ATTEMPTS = 20  # runs that may end, one after another, between a look at the directory and its lock


class PartialDirectory:
    """claim() it, write into `path`, then rename it to OUT or remove() it; release() in any case."""

    def __init__(self, out: Path) -> None:
        self.path = out.with_name(out.name + PARTIAL_SUFFIX)
        self.journal = Journal(self.path)

    def refuse_foreign(self) -> None:
        """InputError where what has the name is not a directory that mtpress has made; a link is none, wherever it leads."""
        kind = _kind(self.path)
        if kind is None:
            return
        if stat.S_ISLNK(kind):
            raise InputError(f"{self.path}: is a link, and mtpress would write there; remove it or choose another OUT")
        mark = _kind(self.journal.directory) if stat.S_ISDIR(kind) else None
        if mark is None or not stat.S_ISDIR(mark):
            if _kind(self.path) is None:
                return  # another run has just given it up
            raise InputError(f"{self.path}: is in the way and was not made by mtpress; move it")

    def claim(self) -> None:
        """Makes the directory, or takes over one that a stopped run has left; nothing in it is touched.

        InputError where something else has its name, ResourceError where another process writes there; OSError as the disk says.
        """
        for _ in range(ATTEMPTS):
            self.refuse_foreign()
            if not os.path.lexists(self.path):
                if self._make():
                    return
                continue
            try:
                self.journal.lock()
            except (FileNotFoundError, NotADirectoryError):
                continue
            if self.journal.is_held():
                return
            self.release()
        raise ResourceError(f"{self.path}: other runs of mtpress keep taking it; wait for them or choose another OUT")

    def _make(self) -> bool:
        """Makes it with its mark and its lock; False where another process was quicker."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        nameless = self._nameless()
        unborn = Journal(nameless)
        unborn.directory.mkdir(parents=True)
        try:
            unborn.lock()
            try:
                nameless.rename(self.path)
            except OSError:
                if not os.path.lexists(self.path):
                    raise
            else:
                self.journal.take_lock(unborn)
        finally:
            if not self.journal.is_held():  # Ctrl-C too: nobody else would clean up
                unborn.unlock()
                shutil.rmtree(nameless, ignore_errors=True)
        return self.journal.is_held()

    def _nameless(self) -> Path:
        """A name beside it that nothing has."""
        return self.path.with_name(f".mtpress-{os.getpid()}-{os.urandom(4).hex()}")

    def remove(self) -> None:
        """Removes the directory, as far as it can be, if it is still the one that was claimed."""
        if not self.journal.is_held():
            return
        for directory, kept in ((self.path, JOURNAL_NAME), (self.journal.directory, LOCK_NAME)):
            with suppress(OSError):
                for entry in directory.iterdir():
                    if entry.name != kept:
                        remove_entry(entry)
        nameless = self._nameless()
        with suppress(OSError):
            self.path.rename(nameless)
            shutil.rmtree(nameless, ignore_errors=True)

    def release(self) -> None:
        self.journal.unlock()


def remove_entry(entry: Path) -> None:
    """What a name stands for; of a link, the link."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with suppress(OSError):
            entry.unlink()


def _kind(path: Path) -> int | None:
    """The mode of what has this name, a link's own; None where nothing has."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
