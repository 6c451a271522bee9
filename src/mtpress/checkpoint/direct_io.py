"""Files read and written past the page cache, where the file system allows it.

A run reads and writes every byte once, so keeping copies in the page cache costs memory and, on virtual machines above all,
most of the time. In: places in files. Out: aligned buffers, and their bytes. Leaves out: what the bytes mean.
"""

import errno
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mtpress.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from mtpress.checkpoint.safetensors import TensorInfo

BLOCK_BYTES = 4096  # no disk in use wants direct transfers aligned to more
PIECE_BYTES = 16 << 20
NUM_STAGES = 3  # pieces of a file in memory: one that is filled, one that is written, one between
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux; elsewhere files are read through the page cache


def round_up(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def aligned_buffer(num_bytes: int) -> memoryview:
    """Zeroed memory that starts on a block, in huge pages where there are any."""
    memory = mmap.mmap(-1, max(round_up(num_bytes), BLOCK_BYTES))
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= PIECE_BYTES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def open_direct(path: "Path", flags: int) -> int:
    """A file descriptor past the page cache, or a plain one where the file system has no such thing."""
    try:
        return os.open(path, flags | O_DIRECT, 0o644)
    except OSError as error:
        if not O_DIRECT or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return os.open(path, flags & ~os.O_EXCL, 0o644)


@contextmanager
def opened(info: "TensorInfo") -> Iterator[int]:
    try:
        file = open_direct(info.file, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{info.file}: cannot be read ({error.strerror or error})") from None
    try:
        yield file
    finally:
        os.close(file)


def read_range(file: int, into: memoryview, start: int, end: int, info: "TensorInfo") -> None:
    """Fills `into`, which begins on a block, with the blocks of a file that hold bytes start … end of a tensor."""
    first = start - start % BLOCK_BYTES
    position = first
    while position < end:
        try:
            count = os.preadv(file, [into[position - first : round_up(end) - first]], position)
        except OSError as error:
            raise InputError(f"{info.file}: cannot be read ({error.strerror or error})") from None
        if position + count < end:
            count -= count % BLOCK_BYTES  # a short read goes on from its last block; inside one it is the end of the file
            if count == 0:
                raise InputError(f"{info.file}: ends inside tensor {info.name}; it changed while it was read, start again")
        position += count


def read_pieces(info: "TensorInfo") -> Iterator[memoryview]:
    """The stored bytes of a tensor in pieces, the next of which is read ahead; each is valid until the next is asked for."""
    if info.stored is not None:
        from mtpress.checkpoint.safetensors import pieces

        yield from pieces(info)
        return
    stop = info.offset + info.num_bytes
    starts = range(info.offset, stop, PIECE_BYTES)
    ends = [min(start + PIECE_BYTES, stop) for start in starts]
    buffers = [aligned_buffer(min(PIECE_BYTES, info.num_bytes) + 2 * BLOCK_BYTES) for _ in starts[:2]]
    with opened(info) as file, ThreadPoolExecutor(max_workers=1, thread_name_prefix="mtpress-read") as pool:

        def read(piece: int) -> None:
            read_range(file, buffers[piece % 2], starts[piece], ends[piece], info)

        ahead: Future[None] | None = None
        for piece, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if ahead is None:
                read(piece)
            else:
                ahead.result()
            ahead = pool.submit(read, piece + 1) if piece + 1 < len(starts) else None
            yield buffers[piece % 2][start % BLOCK_BYTES : start % BLOCK_BYTES + end - start]


class StagedFile:
    """A file that is only appended to, in whole blocks, by a thread of its own while the next ones are filled.

    Opened on a file that exists, it goes on behind byte `end`. What then() gets is called in that thread once all that was
    appended before is written. After a failed write nothing more is written or called, and append() raises what went wrong.
    """

    def __init__(self, path: "Path", flags: int, end: int = 0) -> None:
        self.path = path
        self.file = open_direct(path, flags)
        self.buffers = [aligned_buffer(PIECE_BYTES) for _ in range(NUM_STAGES)]
        self.start = end - end % BLOCK_BYTES  # where the buffer that is being filled stands in the file
        self.filled = end - self.start
        self.failure: BaseException | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mtpress-disk")
        self._writes: list[Future[None]] = []
        if self.filled and os.preadv(self.file, [self.buffers[0][:BLOCK_BYTES]], self.start) < self.filled:
            os.close(self.file)
            raise InputError(f"{path}: ends early; it changed while it was written")
        if end:
            os.ftruncate(self.file, end)

    @property
    def end(self) -> int:
        return self.start + self.filled

    def append(self, data: memoryview) -> None:
        position = 0
        while position < len(data):
            room = self.buffers[0][self.filled :]
            count = min(len(room), len(data) - position)
            room[:count] = data[position : position + count]
            self.filled += count
            position += count
            if self.filled == PIECE_BYTES:
                self.flush()

    def flush(self) -> None:
        """Has what is staged written, its last block padded; that block is written once more with what follows."""
        if self.failure is not None:
            raise self.failure
        buffer = self.buffers.pop(0)
        self._writes.append(self._pool.submit(self._write, buffer, self.start, round_up(self.filled)))
        if len(self._writes) == NUM_STAGES:
            self._writes.pop(0).result()
        whole = self.filled - self.filled % BLOCK_BYTES
        self.buffers[0][: self.filled - whole] = buffer[whole : self.filled]
        self.buffers.append(buffer)
        self.start += whole
        self.filled -= whole

    def then(self, call: Callable[[], None], otherwise: Callable[[BaseException], None] = lambda failure: None) -> None:
        """Has something called when all that was appended is written; `otherwise`, with what went wrong, if it never will be."""
        self.flush()
        self._pool.submit(self._call, call, otherwise)

    def close(self, *, whole: bool) -> None:
        """Waits for all writes and calls. whole: the file ends here, is cut to its size and on the disk when this returns."""
        try:
            if whole:
                self.then(self._cut)
        finally:
            self._pool.shutdown(wait=True)
            os.close(self.file)
        if whole and self.failure is not None:
            raise self.failure

    def _cut(self) -> None:
        os.ftruncate(self.file, self.end)
        os.fdatasync(self.file)

    def _call(self, call: Callable[[], None], otherwise: Callable[[BaseException], None] = lambda failure: None) -> None:
        if self.failure is not None:
            otherwise(self.failure)
            return
        try:
            call()
        except BaseException as error:  # raised where append() is called
            self.failure = error

    def _write(self, buffer: memoryview, start: int, size: int) -> None:
        def write() -> None:
            written = 0
            while written < size:
                count = os.pwritev(self.file, [buffer[written:size]], start + written)
                if written + count < size:
                    count -= count % BLOCK_BYTES
                if count == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written += count

        self._call(write)
