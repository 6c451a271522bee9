"""The only writer of checkpoints: a partial directory, shards in planned order, the index last, one rename at the end.

In: the planned content of every shard, then tensors in exactly that order, then the other files; shards of another
checkpoint that stay as they are, to be hard-linked. Out: a finished directory, or none; a run that is told what it is made of
leaves, when it is stopped, a partial directory that --resume goes on with. Leaves out: how a shard is written
(checkpoint/shard_writer.py), what the tensors are (plan/plan.py, checkpoint/revision.py), what the config files say.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mtpress.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME
from mtpress.checkpoint.direct_io import StagedFile, read_pieces
from mtpress.checkpoint.journal import JOURNAL_NAME, LOCK_NAME, SENSITIVITY_NAME, PartialError
from mtpress.checkpoint.output_place import refuse_place
from mtpress.checkpoint.own_files import own_file
from mtpress.checkpoint.partial_directory import PartialDirectory, remove_entry
from mtpress.checkpoint.safetensors import Shard, TensorInfo
from mtpress.checkpoint.shard_writer import MAX_QUEUED_BYTES, OutputTensor, ShardWriter, disk_failure
from mtpress.errors import InputError, ResourceError
from mtpress.json_files import json_bytes

MAX_SHARD_BYTES = 5_000_000_000
# Another file system, one without hard links, a file with too many of them, or one that this user may not link.
CANNOT_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


def split_into_shards(steps: Sequence[Sequence[OutputTensor]], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[OutputTensor]]:
    """File names → tensors in order, whole steps together; no file over `max_bytes` unless one step alone is."""
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for step in steps:
        step_bytes = sum(tensor.num_bytes for tensor in step)
        if groups[-1] and size + step_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].extend(step)
        size += step_bytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


class CheckpointWriter(ShardWriter):
    """Writes one checkpoint directory. Use as a context manager.

    run: what the bytes of the output depend on. With it finished steps are journaled, and leaving by anything but an
    InputError keeps them in the partial directory; without it, or where no step is finished, leaving by an exception removes
    that directory. resume: go on with a partial directory of the same run, if there is one.
    made_from: directories that it reads, so that it never is one of them, nor writes or removes anything in one.
    linked: whole shards of another checkpoint that belong to this one as they are. They are hard-linked when it is entered;
    those whose files must be copied instead are in `unlinked`, by name; copies: all of them are. The index names their tensors too.
    """

    def __init__(
        self,
        out: Path,
        shards: Mapping[str, Sequence[OutputTensor]],
        metadata: Mapping[str, str],
        *,
        run: Mapping[str, Any] | None = None,
        resume: bool = False,
        made_from: Collection[Path] = (),
        linked: Sequence[Shard] = (),
        copies: bool = False,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        refuse_place(out, made_from)
        self.out, self.run, self.resume, self.made_from = out, run, resume, made_from
        self.linked, self.copies, self.unlinked = linked, copies, dict[str, Path]()
        self.place = PartialDirectory(out)
        self.partial, self.lock = self.place.path, self.place.journal
        super().__init__(self.partial, shards, metadata, max_queued_bytes=max_queued_bytes)

    def __enter__(self) -> Self:
        done = 0
        try:
            self.place.claim()
            refuse_place(self.out, self.made_from)  # another run may have finished it before the lock was ours
            done = self._take_over()
            for shard in self.linked:
                self.link(shard.path.name, shard.path)
            if self.run is not None:
                self.lock.begin(self.run)
                self.journal = self.lock
                self.take_up()
            self.start()
        except BaseException as error:  # Ctrl-C too: nobody else would clean up
            if not done and not isinstance(error, PartialError):
                self.place.remove()
            self.place.release()
            if isinstance(error, OSError):
                raise disk_failure(self.partial, error) from None
            raise
        return self

    def _take_over(self) -> int:
        """Makes what another run has left what this one goes on with, or an empty directory; how many steps of it are finished."""
        self._refuse_links(self.lock.directory)
        done = self.lock.num_finished()
        if done and not self.resume:
            raise PartialError(
                f"{self.partial}: holds an unfinished run, {done} steps of it done; go on with --resume, or delete it to start over"
            )
        if done and self.run is not None:
            self.lock.refuse_other_run(self.run)
        kept = {JOURNAL_NAME, *self.shards} if done else {JOURNAL_NAME}
        for path in [*self.partial.iterdir(), *(() if done else self.lock.directory.iterdir())]:
            if path.name not in kept | {LOCK_NAME, SENSITIVITY_NAME}:
                remove_entry(path)
        self._refuse_links(self.partial)
        return done

    def _refuse_links(self, directory: Path) -> None:
        """PartialError where writing into one of these files could change something outside, or wait for ever."""
        for path in directory.iterdir():
            seen = path.lstat()
            if path != self.lock.directory and (not stat.S_ISREG(seen.st_mode) or seen.st_nlink > 1):
                raise PartialError(f"{path}: is a link or no file, and not what mtpress wrote; delete {self.partial} to start over")

    def link(self, name: str, path: Path, directory: Path | None = None) -> None:
        """Hard-links a finished file to a name in the directory; where that is impossible, it joins `unlinked`.

        directory: the checkpoint that the file is of, if it lies deeper in it. Nothing may write into it then: its bytes are those
        of the other checkpoint.
        """
        place, file = self.partial / name, own_file(directory or path.parent, path)
        if self.copies:
            self.unlinked[name] = file
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, place)
        except OSError as error:
            if error.errno not in CANNOT_LINK:
                raise disk_failure(place, error) from None
            self.unlinked[name] = file

    def copy_unlinked(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Copies what could not be linked. advance: is told of every so many bytes."""
        while self.unlinked:
            name, path = self.unlinked.popitem()
            digest, size = hashlib.sha256(), path.stat().st_size
            try:
                (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
                file, whole = StagedFile(self.partial / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL), False
                try:
                    for piece in read_pieces(TensorInfo(name, "U8", (size,), path, 0, size)):
                        digest.update(piece)
                        file.append(piece)
                        advance(len(piece))
                    whole = True
                finally:
                    file.close(whole=whole)
            except OSError as error:
                raise disk_failure(self.partial / name, error) from None
            self.sha256[name] = digest.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.stop(error)
            if kind is None:
                return
            if isinstance(error, PartialError):
                return  # it says itself what to do with what is there
            done = 0 if self.journal is None or isinstance(error, InputError) else self.journal.num_finished()  # workers' steps too
            if done:
                left = f"{done} finished steps are kept in {self.partial}, the same command with --resume goes on there"
            else:
                self.place.remove()
                left = "the source is untouched and no unfinished output was left"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(left) from None
            if isinstance(error, ResourceError):
                raise ResourceError(f"{error}; {left}") from None
        finally:
            self.place.release()

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a small file beside the weights."""
        if not self.lock.is_held():
            raise ResourceError(f"{self.partial}: was moved or removed while it was written; start again")
        try:
            (self.partial / name).parent.mkdir(exist_ok=True)
            with (self.partial / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_failure(self.partial / name, error) from None
        self.sha256[name] = hashlib.sha256(content).hexdigest()

    def used_bytes(self) -> int:
        """Bytes of all files in the partial directory, the journal's included."""
        return sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())

    def finish(self) -> None:
        """Writes the index and renames the partial directory to its final name."""
        self.copy_unlinked()
        stored: dict[str, Sequence[OutputTensor | TensorInfo]] = {**self.shards, **{s.path.name: s.tensors for s in self.linked}}
        weight_map = {tensor.name: file for file, tensors in stored.items() for tensor in tensors}
        total = sum(tensor.num_bytes for tensors in stored.values() for tensor in tensors)
        assert len(weight_map) == sum(len(tensors) for tensors in stored.values()), "a tensor would be stored twice"
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_file(INDEX_NAME, json_bytes(index))
        try:
            for path in self.lock.directory.glob("hidden-*"):
                path.unlink()  # large, and of no use once every shard is written
            if os.path.lexists(self.out):
                raise ResourceError(f"{self.out}: was made by someone else meanwhile; move it")
            self.partial.rename(self.out)
            parent = os.open(self.out.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
        except OSError as error:
            raise disk_failure(self.out, error) from None
        remove_journal(self.out)


def remove_journal(out: Path) -> None:
    """Takes the journal out of a directory that has its final name."""
    remove_entry(out / JOURNAL_NAME)
