"""The compiled kernel on tensors and threads: the bits of nvfp4.py's eager definition at about the speed of memory.

In: a contiguous BF16 matrix on the CPU. Out: what nvfp4.py documents. Leaves out: the arithmetic, which nvfp4.py defines and
_nvfp4.c repeats. A file of its own, so that nvfp4.py stays the definition and knows nothing of buffers and threads.

The extension is optional: without it KERNELS is empty and nvfp4.py does the work itself.
"""

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

try:
    from mtpress.formats import _nvfp4
except ImportError:
    KERNELS: tuple[str, ...] = ()
else:
    KERNELS = _nvfp4.LEVELS  # the instruction sets of this machine that it is compiled for, best first

BLOCK = 16
PIECE_BLOCKS = 1 << 16  # 2 MiB of BF16: threads that are held up elsewhere leave their pieces to the others
SEARCH_ROWS = 64  # that the kernel searches side by side
HUGE_FROM = 4 << 20  # bytes; a huge page is 2 MiB

Result = TypeVar("Result")


def takes(weight: torch.Tensor) -> bool:
    """Whether the kernel is there and can read this matrix."""
    readable = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.numel() > 0
    return readable and bool(KERNELS)


def quantize(
    weight: torch.Tensor, scale_2: torch.Tensor, kernel: str, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(packed codes, block scales) of a matrix that the kernel takes; ValueError where KERNELS has no such kernel.

    scales: contiguous block scales that are taken as they are.
    """
    n, k = weight.shape
    assert k % BLOCK == 0 and scale_2.dtype == torch.float32
    packed = _empty(n, k // 2)
    given = scales is not None
    scales = _empty(n, k // BLOCK).view(torch.float8_e4m3fn) if scales is None else scales
    weight_bytes, packed_bytes, scale_bytes = (_as_bytes(tensor) for tensor in (weight, packed, scales))
    global_scale = float(scale_2)

    def pack(start: int, end: int) -> None:
        into = packed_bytes[start * BLOCK // 2 : end * BLOCK // 2], scale_bytes[start:end]
        _nvfp4.pack(kernel, global_scale, given, weight_bytes[start * 2 * BLOCK : end * 2 * BLOCK], *into)

    _on_threads(pack, scales.numel())
    return packed, scales


def search(weight: torch.Tensor, scale_2: torch.Tensor, forms: torch.Tensor | None, below: int, above: int, kernel: str) -> torch.Tensor:
    """float8_e4m3fn [N, K/16]: block scales that are searched as rounding/scale_search.py documents.

    forms: contiguous float32 [K/16, 16, 16] on the CPU, or None for the plain squared error. below, above: 0 and 0 for four over six.
    """
    n, k = weight.shape
    assert k % BLOCK == 0 and scale_2.dtype == torch.float32
    blocks = k // BLOCK
    scales = _empty(n, blocks).view(torch.float8_e4m3fn)
    weight_bytes, scale_bytes = _as_bytes(weight), _as_bytes(scales)
    form_bytes = _as_bytes(torch.empty(0) if forms is None else forms)
    global_scale = float(scale_2)

    def some(start: int, end: int) -> None:
        part = weight_bytes[start * 2 * k : end * 2 * k], form_bytes, scale_bytes[start * blocks : end * blocks]
        _nvfp4.search(kernel, global_scale, below, above, blocks, *part)

    _on_threads(some, n, max(1, PIECE_BLOCKS // blocks // SEARCH_ROWS) * SEARCH_ROWS)
    return scales


def amax(weight: torch.Tensor, kernel: str) -> torch.Tensor:
    """float32 scalar: the largest magnitude of a matrix that the kernel takes, infinite or NaN where one of its numbers is."""
    weight_bytes = _as_bytes(weight)

    def largest(start: int, end: int) -> int:
        return _nvfp4.amax(kernel, weight_bytes[start * 2 * BLOCK : end * 2 * BLOCK])

    # magnitudes order as their bits do, infinity above every number and NaN above infinity
    bits = max(_on_threads(largest, -(-weight.numel() // BLOCK)))
    return torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16).float()


def _empty(rows: int, columns: int) -> torch.Tensor:
    """uint8 [rows, columns] of any content; in huge pages if it is large and Linux grants them.

    The first touch of fresh memory in pages of 4 KiB takes about as long as packing into it.
    """
    if rows * columns < HUGE_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(rows, columns, dtype=torch.uint8)
    pages = mmap.mmap(-1, rows * columns, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).view(rows, columns)


def _as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.detach().view(torch.uint8).view(-1).numpy()
    return array


def _on_threads(work: Callable[[int, int], Result], count: int, piece: int | None = None) -> list[Result]:
    """work(start, end) for pieces of what there is, on as many threads as torch uses; the kernel runs without the interpreter lock."""
    starts = range(0, count, piece or PIECE_BLOCKS)
    ends = [min(start + starts.step, count) for start in starts]
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        return [work(start, end) for start, end in zip(starts, ends, strict=True)]
    with ThreadPoolExecutor(threads, "nvfp4") as pool:
        return list(pool.map(work, starts, ends))
