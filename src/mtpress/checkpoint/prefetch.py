"""Reads the next tensors while these compute, into two buffers that are used in turn.

In: groups of tensors in the order they are needed. Out: a generator of dicts name → tensor on the compute device, at most one
group ahead. On a GPU a group lands in pinned memory and is copied on a stream of its own, so disk, copy and compute overlap.

A tensor is valid until the next group is asked for: then its buffer is filled with the group after that. Of those that are named
`sampled` the digest is taken.
"""

import hashlib
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mtpress.checkpoint.direct_io import BLOCK_BYTES, aligned_buffer, opened, read_range, round_up
from mtpress.checkpoint.safetensors import DTYPE_BITS, TensorInfo, bytes_of, read_bytes, torch_dtype

Loaded = tuple[dict[str, torch.Tensor], dict[str, str], "torch.cuda.Event | None"]
SAMPLE_BYTES = 1 << 16


class Prefetch:
    """load() is asked once; closing it, or coming to its end, stops the reading thread.

    ahead: False keeps one buffer and reads a group when it is asked for: less memory where a group is used for long.
    """

    def __init__(
        self, groups: Sequence[Sequence[TensorInfo]], device: torch.device, sampled: Collection[str] = (), *, ahead: bool = True
    ) -> None:
        self.groups, self.device, self.sampled, self.ahead = groups, device, sampled, ahead
        self.digests: dict[str, str] = {}
        self.on_gpu = device.type == "cuda"
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mtpress-prefetch")
        self.copy_stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        size = max((sum(_end(0, info) for info in group) for group in groups), default=0)
        self.host = [self._buffer(size) for _ in range(min(2 if ahead else 1, len(groups)))]
        if self.on_gpu:
            self.device_memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in self.host]
        else:
            self.device_memory = [torch.frombuffer(memory, dtype=torch.uint8) for memory in self.host]

    def _buffer(self, size: int) -> memoryview:
        if not self.on_gpu:
            return aligned_buffer(size)
        pinned = torch.empty(size + BLOCK_BYTES, dtype=torch.uint8, pin_memory=True)
        return bytes_of(pinned)[-pinned.data_ptr() % BLOCK_BYTES :][:size]

    def load(self) -> Generator[dict[str, torch.Tensor], None, None]:
        waiting: list[Future[Loaded]] = []
        free: list[torch.cuda.Event | None] = [None, None]  # what the GPU must have done before a buffer may be filled again
        try:
            for number in range(len(self.groups)):
                if not waiting:
                    waiting.append(self.pool.submit(self._load, number, None))
                tensors, digests, ready = waiting.pop().result()
                self.digests |= digests
                if self.ahead and number + 1 < len(self.groups):
                    waiting.append(self.pool.submit(self._load, number + 1, free[(number + 1) % 2]))
                if ready is not None:
                    torch.cuda.current_stream(self.device).wait_event(ready)
                yield tensors
                if self.on_gpu:
                    used = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    used.record(torch.cuda.current_stream(self.device))
                    free[number % 2] = used
        finally:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, number: int, free: "torch.cuda.Event | None") -> Loaded:
        group, place = self.groups[number], number % len(self.host)
        buffer, device_memory = self.host[place], self.device_memory[place]
        places, end = dict[str, tuple[int, TensorInfo]](), 0
        digests = dict[str, str]()
        for info in sorted(group, key=lambda i: (i.file, i.offset)):
            start = end + info.offset % BLOCK_BYTES  # where in its block it stands on disk, it stands in memory
            end = _end(end, info)
            places[info.name] = (start, info)
            if info.stored is not None:
                read_bytes(info, buffer[start : start + info.num_bytes])
            else:
                with opened(info) as file:
                    read_range(file, buffer[start - info.offset % BLOCK_BYTES : end], info.offset, info.offset + info.num_bytes, info)
            if info.name in self.sampled:
                digests[info.name] = sample_digest(buffer[start : start + info.num_bytes])
        ready = None
        if self.copy_stream is not None:
            with torch.cuda.stream(self.copy_stream):
                if free is not None:
                    self.copy_stream.wait_event(free)
                device_memory[:end].copy_(torch.frombuffer(buffer[:end], dtype=torch.uint8), non_blocking=True)
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
            ready.synchronize()  # in this thread: the pinned buffer is filled again two groups on
        tensors = {name: self._tensor(device_memory, start, info) for name, (start, info) in places.items()}
        return tensors, digests, ready

    def digest(self, name: str) -> str:
        """sample_digest of a tensor that was handed out and is named `sampled`; can be asked for once."""
        return self.digests.pop(name)

    @staticmethod
    def _tensor(memory: torch.Tensor, start: int, info: TensorInfo) -> torch.Tensor:
        stored = memory[start : start + info.num_bytes]
        if start % (DTYPE_BITS[info.dtype] // 8):  # files may place a tensor anywhere
            stored = stored.clone()
        return stored.view(torch_dtype(info.dtype)).view(info.shape)


def sample_digest(stored: memoryview) -> str:
    """SHA-256 of a tensor's first and last SAMPLE_BYTES, or of all of it where it has no more.

    Training moves every row, so this tells two checkpoints with the same headers apart. Hashing all of it would take most of the
    time of a weight-only pass.
    """
    digest = hashlib.sha256(stored[:SAMPLE_BYTES])
    digest.update(stored[max(SAMPLE_BYTES, len(stored) - SAMPLE_BYTES) :])
    return digest.hexdigest()


def _end(start: int, info: TensorInfo) -> int:
    """Where the blocks of a tensor end that are put at `start` of a buffer."""
    return start + round_up(info.offset % BLOCK_BYTES + info.num_bytes)
