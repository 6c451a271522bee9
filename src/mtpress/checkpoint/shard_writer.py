"""Writes safetensors shards into a directory: tensors in planned order, hashed as they are written, finished steps journaled.

In: the planned content of some shards, then their tensors in exactly that order. Out: the files and their SHA-256. Leaves
out: the directory itself, the index and the rename (checkpoint/writer.py).

Computing, hashing and writing overlap: one thread hashes what is queued, another (checkpoint/direct_io.py) writes it, waits for the
disk at the end of a step and then adds its line to the journal. At most `max_queued_bytes` wait in memory.
"""

import errno
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint.direct_io import StagedFile, read_pieces
from mtpress.checkpoint.journal import Finished, Journal, PartialError
from mtpress.checkpoint.safetensors import DTYPE_BITS, TensorInfo, bytes_of, torch_dtype
from mtpress.errors import WHAT_TO_TRY, InputError, ResourceError

if TYPE_CHECKING:
    import torch

MAX_QUEUED_BYTES = 256 << 20
CACHED_BYTES = 512 << 10


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        bits = DTYPE_BITS[self.dtype]
        for size in self.shape:
            bits *= size
        return bits // 8


def shard_header(tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a safetensors file, padded with spaces so that the data starts at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        end = position + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def disk_failure(path: Path, error: OSError) -> ResourceError:
    known = {number: hint for number, hint in WHAT_TO_TRY.items() if number != errno.ENOENT}  # of what is read
    hint = known.get(error.errno or 0, "free space or choose another disk")
    return ResourceError(f"{path}: cannot be written ({error.strerror or error}); {hint}")


@dataclass(frozen=True)
class StepEnd:
    """Queued behind the tensors of a step. `settle` puts on the disk what else the step needs to count as finished."""

    step: str
    num_tensors: int
    settle: Callable[[], None] | None
    sources: dict[str, str]
    states: dict[str, str]


@dataclass(frozen=True)
class Copied:
    """Queued for a tensor that is copied. finite: NaN and infinity in it are refused."""

    info: TensorInfo
    finite: bool

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes; InputError at a number that is not finite. What is rounded on the way (`info.stored`) refuses them itself."""
        looked_at = self.finite and self.info.stored is None and self.info.dtype in ("BF16", "F16", "F32")
        for piece in read_pieces(self.info):
            if looked_at and not _is_finite(piece, self.info.dtype):
                raise not_finite(self.info.name)
            yield piece


def _is_finite(piece: memoryview, dtype: str) -> bool:
    import torch

    return bool(torch.frombuffer(piece, dtype=torch_dtype(dtype)).isfinite().all())


def not_finite(name: str) -> InputError:
    """Of a tensor of the source that quantize reads."""
    return InputError(f"{name} holds NaN or infinite values; the source is damaged, fetch it again")


Queued = tuple[str, memoryview | Copied | StepEnd | None]


class ShardWriter:
    """start(), then the planned tensors in planned order (anything else is a bug of the caller), then wait(); or stop().

    With a journal that knows finished steps, the plan begins behind them: `finished` names them, and what is on disk is
    read again and held against the journal's hashes before it is added to.
    """

    def __init__(
        self,
        directory: Path,
        shards: Mapping[str, Sequence[OutputTensor]],
        metadata: Mapping[str, str],
        *,
        journal: Journal | None = None,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        self.directory, self.shards, self.metadata, self.journal = directory, shards, metadata, journal
        self.max_queued_bytes = max_queued_bytes
        self.sha256: dict[str, str] = {}
        self.finished: set[str] = set()
        self.sources: dict[str, str] = {}
        self.states: dict[str, dict[str, str]] = {}  # finished step → what its journal line says of the samples' states
        self._planned: list[tuple[str, int, OutputTensor]] = []  # what is still to be written: file, place in the file, tensor
        self._next = 0
        self._begun: dict[str, Finished] = {}
        self._failure: BaseException | None = None
        self._queue: queue.Queue[Queued] = queue.Queue()
        self._queued_bytes = 0
        self._room = threading.Condition()
        self._thread = threading.Thread(target=self._drain, name="mtpress-writer", daemon=True)
        self._file: StagedFile | None = None
        self.take_up()

    def take_up(self) -> None:
        """Plans what the journal does not know as finished; all of it where there is no journal."""
        self._planned, self._next, self._begun = [], 0, {}
        for file, tensors in self.shards.items():
            steps = self.journal.finished(file) if self.journal is not None else []
            done = self._done(file, steps[-1]) if steps else 0
            self.finished |= {step.step for step in steps}
            for step in steps:
                self.sources |= step.sources
                self.states[step.step] = step.states
            self._planned += [(file, place, tensor) for place, tensor in enumerate(tensors[done:], done)]
            if steps and done == len(tensors):
                self.sha256[file] = steps[-1].sha256
                os.truncate(self.directory / file, steps[-1].end)  # what follows is padding of the last block
            elif steps:
                self._begun[file] = steps[-1]

    def _done(self, file: str, last: Finished) -> int:
        """How many tensors of a shard are finished; PartialError where file and journal do not go together."""
        tensors = self.shards[file][: last.num_tensors]
        end = len(shard_header(self.shards[file], self.metadata)) + sum(tensor.num_bytes for tensor in tensors)
        path = self.directory / file
        if end != last.end or not path.exists() or path.stat().st_size < end:
            raise PartialError(f"{path}: is not what its journal says; delete {self.directory} to start over")
        return len(tensors)

    def start(self) -> None:
        self._thread.start()

    def _take(self, name: str) -> tuple[str, OutputTensor]:
        file, _, planned = self._planned[self._next]
        assert planned.name == name, f"{name} written where {planned.name} was planned"
        self._next += 1
        return file, planned

    def copy(self, info: TensorInfo, name: str | None = None, *, finite: bool = False) -> None:
        """Queues the next planned tensor as a copy of a stored one, bit for bit; it never is in memory whole.

        name: what it is called from now on, if not as it is stored. finite: InputError, here or later, where it holds NaN or infinity.
        """
        file, planned = self._take(name or info.name)
        assert (info.dtype, info.shape) == (planned.dtype, planned.shape), f"{info.name}: copied where another layout was planned"
        self._raise_failure()
        self._queue.put((file, Copied(info, finite)))

    def write(self, name: str, tensor: "torch.Tensor") -> None:
        """Queues the next planned tensor; its memory must not change afterwards."""
        _, _, planned = self._planned[self._next]
        assert tuple(tensor.shape) == planned.shape, f"{name}: {tuple(tensor.shape)} written, {planned.shape} planned"
        self.write_pieces(name, (tensor,))

    def write_pieces(self, name: str, pieces: "Iterable[torch.Tensor]") -> None:
        """Queues the next planned tensor, handed over in consecutive pieces, so that it never is in memory whole.

        The pieces end to end are the tensor; the memory of none may change afterwards.
        """
        file, planned = self._take(name)
        queued = 0
        for piece in pieces:
            assert piece.dtype == torch_dtype(planned.dtype), f"{name}: {piece.dtype} written, {planned.dtype} planned"
            data = bytes_of(piece.detach().cpu().contiguous())
            queued += len(data)
            assert queued <= planned.num_bytes, f"{name}: more than {planned.dtype} {planned.shape} written"
            self._enqueue(file, data)
        assert queued == planned.num_bytes, f"{name}: {queued} bytes written, {planned.dtype} {planned.shape} planned"

    def _enqueue(self, file: str, data: memoryview) -> None:
        with self._room:
            self._room.wait_for(lambda: self._failure or self._queued_bytes == 0 or self._queued_bytes + len(data) <= self.max_queued_bytes)
            self._raise_failure()
            self._queued_bytes += len(data)
        self._queue.put((file, data))

    def end_step(
        self,
        step: str,
        settle: Callable[[], None] | None = None,
        sources: Mapping[str, str] | None = None,
        states: Mapping[str, str] | None = None,
    ) -> None:
        """Says that all tensors of a step are queued. It counts as finished when they, and what `settle` writes, are on the disk.

        sources: digests of the stored matrices that the step has read, by name; `sources` of this writer collects them. states: SHA-256
        of the samples' states behind it, by stream, for the journal.
        """
        file, place, _ = self._planned[self._next - 1]
        self._queue.put((file, StepEnd(step, place + 1, settle, dict(sources or {}), dict(states or {}))))

    def wait_for_step(self, step: str) -> None:
        """Returns when the step is finished."""
        with self._room:
            self._room.wait_for(lambda: self._failure or step in self.finished)
            self._raise_failure()

    def wait(self) -> None:
        """Returns when every planned tensor is on disk and hashed."""
        assert self._next == len(self._planned), f"{len(self._planned) - self._next} planned tensors were not written"
        self._queue.put(("", None))
        self._thread.join()
        self._raise_failure()

    def stop(self, error: BaseException | None) -> None:
        """Gives up: nothing more is written; a step whose bytes are all written is still journaled."""
        if self._thread.is_alive():
            self._failure = self._failure or error or RuntimeError("left before wait()")
            self._queue.put(("", None))
            self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        if isinstance(self._failure, OSError):
            raise disk_failure(self.directory, self._failure) from None
        raise self._failure

    def _fail(self, error: BaseException) -> None:
        with self._room:
            self._failure = self._failure or error
            self._room.notify_all()

    def _drain(self) -> None:
        current, digest = "", hashlib.sha256()
        try:
            while True:
                file, data = self._queue.get()
                if self._failure is not None:
                    return
                if file != current:
                    self._close(current, digest)
                    current = file
                    if file:
                        digest = self._open(file)
                if data is None:
                    return
                assert self._file is not None
                if isinstance(data, StepEnd):
                    finished = Finished(data.step, data.num_tensors, self._file.end, digest.copy().hexdigest(), data.sources, data.states)
                    self._file.then(partial(self._settle, self._file.file, file, finished, data.settle), self._fail)
                    continue
                for piece in data.pieces() if isinstance(data, Copied) else in_pieces(data):
                    if self._failure is not None:
                        return
                    digest.update(piece)
                    self._file.append(piece)
                if not isinstance(data, Copied):
                    with self._room:
                        self._queued_bytes -= len(data)
                        self._room.notify_all()
        except BaseException as error:  # handed to the thread that writes
            self._fail(error)
        finally:
            if self._file is not None:
                self._file.close(whole=False)

    def _open(self, file: str) -> "hashlib._Hash":
        """Opens a shard; the hash of what it begins with: its header, or all that is finished."""
        path, digest = self.directory / file, hashlib.sha256()
        begun = self._begun.get(file)
        if begun is None:
            # what stands there without a line in the journal is of a step that did not finish
            self._file = StagedFile(path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if self.journal else os.O_EXCL))
            header = memoryview(shard_header(self.shards[file], self.metadata))
            digest.update(header)
            self._file.append(header)
            return digest
        self.hash_again(file, begun.end, begun.sha256, digest)
        self._file = StagedFile(path, os.O_RDWR, begun.end)
        return digest

    def hash_again(
        self, file: str, end: int, sha256: str, digest: "hashlib._Hash", advance: Callable[[int], None] = lambda count: None
    ) -> None:
        """Feeds `digest` with the first `end` bytes of a shard; PartialError where their hash is another."""
        path = self.directory / file
        for piece in read_pieces(TensorInfo(file, "U8", (end,), path, 0, end)):
            digest.update(piece)
            advance(len(piece))
        if digest.hexdigest() != sha256:
            raise PartialError(f"{path}: its bytes are not those the journal tells of; delete {self.directory} to start over")

    def _close(self, name: str, digest: "hashlib._Hash") -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close(whole=True)
            self.sha256[name] = digest.hexdigest()

    def _settle(self, file: int, shard: str, finished: Finished, settle: Callable[[], None] | None) -> None:
        """In the thread that writes, behind all bytes of the step: waits for the disk, then journals it."""
        try:
            os.fdatasync(file)
            if settle is not None:
                settle()
            if self.journal is not None:
                self.journal.append(shard, finished)
        except BaseException as error:
            self._fail(error)
            raise
        with self._room:
            self.finished.add(finished.step)
            self.sources |= finished.sources
            self._room.notify_all()


def in_pieces(data: memoryview) -> Iterator[memoryview]:
    """Small enough to be in the processor's cache when it is hashed and then staged."""
    return (data[start : start + CACHED_BYTES] for start in range(0, len(data), CACHED_BYTES))
