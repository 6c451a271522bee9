"""Which files a checkpoint may hand on: its own, plain ones.

In: a checkpoint directory. Out: the files themselves, behind their links, or an InputError. Leaves out: reading them.

A link that leaves the directory could hand on anything that this user may read, and a hard link to it would let whoever edits the
output edit that. The one exception is the Hub's cache, known by its structure: snapshots/REVISION/file → ../../blobs/HASH.
"""

import os
import re
import stat
from pathlib import Path

from mtpress.errors import InputError

BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def own_file(directory: Path, path: Path) -> Path:
    """The file that `path`, somewhere below `directory`, stands for; InputError where that is elsewhere, missing, or no plain file."""
    root, real = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    if root not in real.parents and not _is_blob(root, real):
        raise InputError(f"{path}: is a link to {real}, outside the checkpoint; put the file itself in its place, or remove it")
    try:
        mode = real.stat().st_mode
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is no plain file; remove it")
    return real


def refuse_foreign_files(directory: Path) -> None:
    """InputError that names a link out of the directory, a pipe, a device or a socket in it. Folders of tools, as .cache, are left out."""
    for folder, folders, files in os.walk(directory, onerror=_unreadable):
        if Path(folder) == directory:
            folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder) / name for name in sorted([*folders, *files])):
            if path.is_dir():
                if path.is_symlink() and Path(os.path.realpath(directory)) not in Path(os.path.realpath(path)).parents:
                    raise InputError(f"{path}: is a link to {os.path.realpath(path)}, outside the checkpoint; remove it")
            else:
                own_file(directory, path)


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot be read ({error.strerror or error}); change its permissions") from None


def _is_blob(root: Path, real: Path) -> bool:
    """Whether `real` is a blob of the Hub's cache that the snapshot `root`, or a folder of one, belongs to."""
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    return snapshots is not None and real.parent == snapshots.parent / "blobs" and BLOB.fullmatch(real.name) is not None
