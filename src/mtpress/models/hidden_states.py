"""Hidden states of all calibration samples at a layer boundary, in memory or on disk.

In: the states of one sample after another, as a layer makes them. Out: the same states, when the next layer asks for them.
Leaves out: the layers (models/). On disk, states are written behind and read ahead by threads of their own, the page cache
is what holds them as long as memory allows, and three boundaries stay in three files, so that a run which was stopped finds
the last finished one whole.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from mtpress.checkpoint.journal import PartialError
from mtpress.checkpoint.safetensors import bytes_of
from mtpress.checkpoint.shard_writer import disk_failure
from mtpress.errors import InputError

NUM_SLOTS = 3  # the boundary a layer reads, the one it writes, and the one before, until the layer behind it is journaled
STREAM = "hidden"  # what the files of a run's states are called, and how the names of its other streams begin
NUM_WAITING = 2  # samples that may wait in memory to be written
OPENED = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
HASHED_BYTES = 2 << 20  # pieces of a sample that are hashed side by side
NUM_HASHERS = min(4, os.cpu_count() or 1)


def slot_file(directory: Path, boundary: int, stream: str = STREAM) -> Path:
    """The file that holds the states of a stream at a boundary."""
    return directory / f"{stream}-{boundary % NUM_SLOTS}.bin"


def sync_states(directory: Path, boundary: int, stream: str = STREAM) -> None:
    """Waits until the states at a boundary, whichever process wrote them, are on the disk."""
    file = os.open(slot_file(directory, boundary, stream), os.O_RDWR)
    try:
        os.fdatasync(file)
    finally:
        os.close(file)


def sample_digest(pieces: Iterable[bytes]) -> bytes:
    """Of one sample's states: SHA-256 of the SHA-256s of its pieces."""
    return hashlib.sha256(b"".join(pieces)).digest()


def states_sha256(digests: Mapping[int, bytes]) -> str:
    """Of all samples at a boundary: SHA-256 of the digests of each, in order."""
    return hashlib.sha256(b"".join(digests[sample] for sample in sorted(digests))).hexdigest()


def refuse_other_states(
    directory: Path,
    boundary: int,
    lengths: Sequence[int],
    hidden_size: int,
    said: Mapping[str, str],
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """PartialError where the states at a boundary are not those that a journal tells of: `said` has their SHA-256 by stream."""
    for stream, expected in said.items():
        states = DiskStates(directory, lengths, hidden_size, boundary=boundary, stream=stream, hashed=True)
        try:
            found = states.hash_again(advance)
        finally:
            states.close()
        if found != expected:
            raise PartialError(
                f"{slot_file(directory, boundary, stream)}: the hidden states in front of layer {boundary} are not those the journal tells "
                f"of; delete {directory.parent} to start over"
            )


class MemoryStates:
    """States in memory: put() in order of samples, get() any of them, advance() once every sample has passed a layer."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def put(self, sample: int, states: Tensor) -> None:
        if sample == len(self.states):
            self.states.append(states.cpu())
        else:
            self.states[sample] = states.cpu()

    def get(self, sample: int) -> Tensor:
        return self.states[sample]

    def settle(self) -> None:
        """Nothing waits here."""

    def advance(self) -> None:
        """The states of the last layer have taken the place of those in front of it."""


class DiskStates:
    """States in `{stream}-{boundary % 3}.bin` of a directory; sample i of the whole set always has the same place in the file.

    members: the samples of the set that are moved here, in order; workers share the files. boundary: the one to start from, 0 in
    front of the first layer; it is on disk already if it is not 0. pinned: what get() returns is for copying to a GPU. hashed:
    `digests` has one of each member's states at `boundary`, taken as they were put.
    """

    def __init__(
        self,
        directory: Path,
        lengths: Sequence[int],
        hidden_size: int,
        *,
        boundary: int = 0,
        members: Sequence[int] | None = None,
        pinned: bool = False,
        stream: str = STREAM,
        hashed: bool = False,
    ) -> None:
        self.directory, self.hidden_size, self.boundary, self.stream = directory, hidden_size, boundary, stream
        self.lengths = lengths
        self.members = list(range(len(lengths))) if members is None else list(members)
        self.starts = [0, *accumulate(2 * length * hidden_size for length in lengths)]
        self.pinned = pinned
        self._read = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mtpress-states-read")
        self._write = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mtpress-states-write")
        self._hashers = ThreadPoolExecutor(max_workers=NUM_HASHERS, thread_name_prefix="mtpress-states-hash") if hashed else None
        self._put: dict[int, bytes] = {}
        self.digests: dict[int, bytes] = {}
        self._ahead: tuple[int, Future[Tensor]] | None = None
        self._written: list[Future[None]] = []
        self._room = threading.Semaphore(NUM_WAITING)
        self._embedded = boundary > 0
        try:
            self.files = [os.open(slot_file(directory, slot, stream), OPENED, 0o644) for slot in range(NUM_SLOTS)]
        except OSError as error:
            raise disk_failure(directory, error) from None
        if boundary and os.fstat(self.files[boundary % NUM_SLOTS]).st_size < self.starts[-1]:
            self.close()
            raise PartialError(
                f"{directory}: the hidden states in front of layer {boundary} are not there; delete {directory.parent} to start over"
            )

    def close(self) -> None:
        self._read.shutdown(wait=True, cancel_futures=True)
        self._write.shutdown(wait=True, cancel_futures=True)
        if self._hashers is not None:
            self._hashers.shutdown(wait=True, cancel_futures=True)
        for file in self.files:
            os.close(file)

    def get(self, sample: int) -> Tensor:
        """bfloat16 [1, T, hidden] of a member, in memory of its own; the next member's are read meanwhile."""
        wanted = self._ahead[1] if self._ahead and self._ahead[0] == sample else self._read.submit(self._load, sample)
        states = wanted.result()
        following = sample + 1
        self._ahead = (following, self._read.submit(self._load, following)) if self._embedded and following < len(self.members) else None
        return states

    def peek(self, sample: int) -> Tensor:
        """As get(), of any member and in any order; nothing is read ahead."""
        return self._load(sample)

    def put(self, sample: int, states: Tensor) -> None:
        """Queues the states of a member behind the layer (before the first advance(): in front of the first layer)."""
        self._room.acquire()
        ready = None
        if states.is_cuda:
            host = torch.empty(states.shape, dtype=torch.bfloat16, pin_memory=True)
            host.copy_(states, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        else:
            host = states.to(torch.bfloat16).contiguous()
        slot = (self.boundary + self._embedded) % NUM_SLOTS
        self._written.append(self._write.submit(self._store, sample, host, slot, ready))

    def settle(self) -> None:
        """Returns when every queued sample is written; raises what went wrong there."""
        for written in self._written:
            written.result()
        self._written.clear()

    def advance(self) -> None:
        """Every member has passed a layer: what was put is what get() gives from now on."""
        self.settle()
        self.digests, self._put = self._put, {}
        self._ahead = None
        if self._embedded:
            self.boundary += 1
        self._embedded = True

    def sha256(self) -> str:
        """Of what every sample holds now; for who moves all of them."""
        return states_sha256(self.digests)

    def hash_again(self, advance: Callable[[int], None]) -> str:
        """sha256() of what stands on the disk."""
        for sample in range(len(self.members)):
            view = bytes_of(self.peek(sample))
            self.digests[self.members[sample]] = self._digest(view)
            advance(len(view))
        return self.sha256()

    def _digest(self, view: memoryview, meanwhile: Callable[[], None] = lambda: None) -> bytes:
        assert self._hashers is not None
        pieces = [view[start : start + HASHED_BYTES] for start in range(0, len(view), HASHED_BYTES)]
        hashing = [self._hashers.submit(_piece_digest, piece) for piece in pieces]
        meanwhile()
        return sample_digest(piece.result() for piece in hashing)

    def sync(self, boundary: int) -> None:
        """Waits until the states at a boundary are on the disk."""
        sync_states(self.directory, boundary, self.stream)

    def _place(self, sample: int) -> tuple[int, tuple[int, int, int]]:
        member = self.members[sample]
        return self.starts[member], (1, self.lengths[member], self.hidden_size)

    def _load(self, sample: int) -> Tensor:
        start, shape = self._place(sample)
        states = torch.empty(shape, dtype=torch.bfloat16, pin_memory=self.pinned)
        view, position = bytes_of(states), 0
        while position < len(view):
            count = os.preadv(self.files[self.boundary % NUM_SLOTS], [view[position:]], start + position)
            if count == 0:
                raise InputError(f"{self.directory}: hidden states end early; delete {self.directory.parent} to start over")
            position += count
        return states

    def _store(self, sample: int, states: Tensor, slot: int, ready: "torch.cuda.Event | None") -> None:
        try:
            if ready is not None:
                ready.synchronize()
            start, _ = self._place(sample)
            view = bytes_of(states)
            if self._hashers is None:
                _write_at(self.files[slot], view, start)
            else:
                self._put[self.members[sample]] = self._digest(view, lambda: _write_at(self.files[slot], view, start))
        except OSError as error:
            raise disk_failure(self.directory, error) from None
        finally:
            self._room.release()


def _piece_digest(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()


def _write_at(file: int, view: memoryview, start: int) -> None:
    position = 0
    while position < len(view):
        position += os.pwritev(file, [view[position:]], start + position)
