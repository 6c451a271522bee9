"""The only writer of checkpoints: a partial directory, shards in planned order, the index last, one rename at the end.

In: the planned content of every shard, then tensors in exactly that order, then the other files. Out: a finished
directory, or none. Leaves out: what the tensors are (plan.py) and what the config files say (the stages).

Bytes are hashed as they are written, by one background thread that owns all file descriptors, so computing, hashing
and writing overlap; at most `max_queued_bytes` wait in memory.
"""

import hashlib
import json
import os
import queue
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mtpress.checkpoint import DTYPE_BITS, INDEX_NAME, SINGLE_NAME, TensorInfo, bytes_of, read_pieces, torch_dtype
from mtpress.errors import InputError, ResourceError

if TYPE_CHECKING:
    import torch

PARTIAL_SUFFIX = ".partial"
PARTIAL_MARK = ".mtpress-partial"  # stands in a directory that mtpress may delete
MAX_SHARD_BYTES = 5_000_000_000
MAX_QUEUED_BYTES = 1 << 30


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


def split_into_shards(tensors: Sequence[OutputTensor], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[OutputTensor]]:
    """File names → tensors in order, no file over `max_bytes` unless one tensor alone is; one file is model.safetensors."""
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


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
    return ResourceError(
        f"{path}: cannot be written ({error.strerror or error}); free space or choose another disk, nothing was left behind"
    )


class CheckpointWriter:
    """Writes one checkpoint directory. Use as a context manager: leaving it by an exception removes the partial directory.

    write() takes the planned tensors in planned order; anything else is a bug of the caller (assert).
    """

    def __init__(
        self,
        out: Path,
        shards: Mapping[str, Sequence[OutputTensor]],
        metadata: Mapping[str, str],
        *,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
    ) -> None:
        self.out = out
        self.max_queued_bytes = max_queued_bytes
        self.partial = out.with_name(out.name + PARTIAL_SUFFIX)
        self.shards = shards
        self.metadata = metadata
        self.sha256: dict[str, str] = {}
        self._planned = [(file, tensor) for file, tensors in shards.items() for tensor in tensors]
        self._next = 0
        self._failure: BaseException | None = None
        self._queue: queue.Queue[tuple[str, memoryview | TensorInfo | None]] = queue.Queue()
        self._queued_bytes = 0
        self._room = threading.Condition()
        self._thread = threading.Thread(target=self._drain, name="mtpress-writer", daemon=True)
        self._file: Any = None

    def __enter__(self) -> Self:
        if self.out.exists():
            raise InputError(f"{self.out}: exists already; name a directory that does not")
        made = False
        try:
            if self.partial.exists():
                if not (self.partial / PARTIAL_MARK).exists():
                    raise InputError(f"{self.partial}: is in the way and was not made by mtpress; move it")
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
            made = True
            (self.partial / PARTIAL_MARK).touch()
            self._thread.start()
        except BaseException as error:  # Ctrl-C too: nobody else would clean up
            if made:
                shutil.rmtree(self.partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise disk_failure(self.partial, error) from None
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._thread.is_alive():
            self._failure = self._failure or error or RuntimeError("left before finish()")
            self._queue.put(("", None))
            self._thread.join()
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _take(self, name: str) -> tuple[str, OutputTensor]:
        file, planned = self._planned[self._next]
        assert planned.name == name, f"{name} written where {planned.name} was planned"
        self._next += 1
        return file, planned

    def copy(self, info: TensorInfo) -> None:
        """Queues the next planned tensor as a copy of a stored one, bit for bit; it never is in memory whole."""
        file, planned = self._take(info.name)
        assert (info.dtype, info.shape) == (planned.dtype, planned.shape), f"{info.name}: copied where another layout was planned"
        self._raise_failure()
        self._queue.put((file, info))

    def write(self, name: str, tensor: "torch.Tensor") -> None:
        """Queues the next planned tensor; its memory must not change afterwards."""
        _, planned = self._planned[self._next]
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

    def write_file(self, name: str, content: bytes) -> None:
        """Writes a small file beside the weights."""
        try:
            with (self.partial / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_failure(self.partial / name, error) from None
        self.sha256[name] = hashlib.sha256(content).hexdigest()

    def wait_for_shards(self) -> None:
        """Returns when every planned tensor is on disk and hashed."""
        assert self._next == len(self._planned), f"{len(self._planned) - self._next} planned tensors were not written"
        self._queue.put(("", None))
        self._thread.join()
        self._raise_failure()

    def finish(self) -> None:
        """Writes the index and renames the partial directory to its final name."""
        weight_map = {tensor.name: file for file, tensor in self._planned}
        total = sum(tensor.num_bytes for _, tensor in self._planned)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_file(INDEX_NAME, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
        try:
            (self.partial / PARTIAL_MARK).unlink()
            self.partial.rename(self.out)
            parent = os.open(self.out.parent, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)
        except OSError as error:
            raise disk_failure(self.out, error) from None

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        if isinstance(self._failure, OSError):
            raise disk_failure(self.partial, self._failure) from None
        raise self._failure

    def _drain(self) -> None:
        current, digest = "", hashlib.sha256()
        try:
            while True:
                file, data = self._queue.get()
                if self._failure is not None:
                    return
                if file != current:
                    self._close(current, digest)
                    current, digest = file, hashlib.sha256()
                    if file:
                        self._file = (self.partial / file).open("xb", buffering=0)
                        self._put(memoryview(shard_header(self.shards[file], self.metadata)), digest)
                if data is None:
                    return
                if isinstance(data, TensorInfo):
                    for piece in read_pieces(data):
                        if self._failure is not None:
                            return
                        self._put(piece, digest)
                    continue
                self._put(data, digest)
                with self._room:
                    self._queued_bytes -= len(data)
                    self._room.notify_all()
        except BaseException as error:  # handed to the thread that writes
            with self._room:
                self._failure = error
                self._room.notify_all()
        finally:
            if self._file is not None:
                self._file.close()

    def _put(self, data: memoryview, digest: Any) -> None:
        for start in range(0, len(data), 16 << 20):
            piece = data[start : start + (16 << 20)]
            digest.update(piece)
            written = 0
            while written < len(piece):
                written += self._file.write(piece[written:])

    def _close(self, name: str, digest: Any) -> None:
        if self._file is None:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self.sha256[name] = digest.hexdigest()
