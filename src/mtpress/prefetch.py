"""Reads the next step's tensors while this one computes.

In: the tensors of each step in streaming order. Out: an iterator of dicts name → tensor on the compute device, at most
one step ahead. On a GPU each step lands in pinned memory and is copied on a stream of its own, so disk, copy and
compute overlap; two steps' buffers exist at a time.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from mtpress.checkpoint import TensorInfo, bytes_of, read_bytes, torch_dtype


class Prefetch:
    """Iterate over it once; close() (or the end of the loop) stops the reading thread."""

    def __init__(self, steps: Sequence[Sequence[TensorInfo]], device: torch.device) -> None:
        self.steps, self.device = steps, device
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mtpress-prefetch")
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        waiting: Future[tuple[dict[str, torch.Tensor], torch.cuda.Event | None]] | None = None
        try:
            for number in range(len(self.steps)):
                current = waiting or self.pool.submit(self._load, self.steps[number])
                tensors, ready = current.result()
                waiting = self.pool.submit(self._load, self.steps[number + 1]) if number + 1 < len(self.steps) else None
                del current
                if ready is not None:
                    torch.cuda.current_stream(self.device).wait_event(ready)
                    for tensor in tensors.values():
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield tensors
        finally:
            self.close()

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, infos: Sequence[TensorInfo]) -> tuple[dict[str, torch.Tensor], torch.cuda.Event | None]:
        on_gpu = self.copy_stream is not None
        read = {info.name: self._read(info, pinned=on_gpu) for info in infos}
        if self.copy_stream is None:
            return read, None
        with torch.cuda.stream(self.copy_stream):
            moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in read.items()}
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        ready.synchronize()  # in this thread: the pinned pages may go once the copy is done
        return moved, ready

    @staticmethod
    def _read(info: TensorInfo, pinned: bool) -> torch.Tensor:
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype), pin_memory=pinned)
        read_bytes(info, bytes_of(tensor))
        return tensor
