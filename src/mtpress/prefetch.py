"""Reads the next tensors while these compute, into two buffers that are used in turn.

In: groups of tensors in the order they are needed. Out: a generator of dicts name → tensor on the compute device, at most one
group ahead. On a GPU a group lands in pinned memory and is copied on a stream of its own, so disk, copy and compute overlap.

A tensor is valid until the next group is asked for: then its buffer is filled with the group after that.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mtpress.checkpoint import TensorInfo, bytes_of, read_bytes, torch_dtype

ALIGNMENT = 64  # bytes; a cache line, and no dtype wants more
Loaded = tuple[dict[str, torch.Tensor], "torch.cuda.Event | None"]


class Prefetch:
    """load() is asked once; closing it, or coming to its end, stops the reading thread."""

    def __init__(self, groups: Sequence[Sequence[TensorInfo]], device: torch.device) -> None:
        self.groups, self.device = groups, device
        self.on_gpu = device.type == "cuda"
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mtpress-prefetch")
        self.copy_stream = torch.cuda.Stream(device) if self.on_gpu else None  # type: ignore[no-untyped-call]
        size = max((sum(_aligned(info.num_bytes) for info in group) for group in groups), default=0)
        num_buffers = min(2, len(groups))
        self.host = [torch.empty(size, dtype=torch.uint8, pin_memory=self.on_gpu) for _ in range(num_buffers)]
        self.device_memory = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(num_buffers)] if self.on_gpu else self.host

    def load(self) -> Generator[dict[str, torch.Tensor], None, None]:
        waiting: list[Future[Loaded]] = []
        free: list[torch.cuda.Event | None] = [None, None]  # what the GPU must have done before a buffer may be filled again
        try:
            for number in range(len(self.groups)):
                if not waiting:
                    waiting.append(self.pool.submit(self._load, number, None))
                tensors, ready = waiting.pop().result()
                if number + 1 < len(self.groups):
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
        group, host, device_memory = self.groups[number], self.host[number % 2], self.device_memory[number % 2]
        places, end = {}, 0
        for info in sorted(group, key=lambda i: (i.file, i.offset)):
            places[info.name] = (end, info)
            read_bytes(info, bytes_of(host[end : end + info.num_bytes]))
            end += _aligned(info.num_bytes)
        ready = None
        if self.copy_stream is not None:
            with torch.cuda.stream(self.copy_stream):
                if free is not None:
                    self.copy_stream.wait_event(free)
                device_memory[:end].copy_(host[:end], non_blocking=True)
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
            ready.synchronize()  # in this thread: the pinned buffer is filled again two groups on
        tensors = {
            name: device_memory[start : start + info.num_bytes].view(torch_dtype(info.dtype)).view(info.shape)
            for name, (start, info) in places.items()
        }
        return tensors, ready


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
