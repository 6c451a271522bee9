"""The compiled kernel of sign-gradient rounding on tensors and threads: the bits of signround.py's eager definition, fast.

In: contiguous tensors on the CPU. Out: what dequantize, pack_codes and step of signround.py document. Leaves out: the
arithmetic, which signround.py defines and formats/_signround.c repeats.

The extension is optional: without it KERNELS is empty and signround.py does the work itself.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    from mtpress.formats import _signround
except ImportError:
    KERNELS: tuple[str, ...] = ()
else:
    KERNELS = _signround.LEVELS  # the instruction sets of this machine that it is compiled for, best first

GROUP_SIZE = 128
PIECE_GROUPS = 1 << 13  # a million numbers: threads that are held up elsewhere leave their pieces to the others


def takes(weight: Tensor) -> bool:
    """Whether the kernel is there and can read this matrix."""
    return bool(KERNELS) and weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.is_contiguous()


def dequantize(weight: Tensor, offset: Tensor, scale: Tensor, out: Tensor, kernel: str) -> None:
    """Fills out bfloat16 [N, K]; scale float32 [N, K/128]."""
    buffers = _as_bytes(weight), _as_bytes(offset), _as_bytes(scale), _as_bytes(out)
    _on_threads(lambda part: _signround.dequantize(kernel, *(b[part(b)] for b in buffers)), scale.numel())


def pack_codes(weight: Tensor, offset: Tensor, scale: Tensor, out: Tensor, kernel: str) -> None:
    """Fills out uint8 [N, K/2]."""
    buffers = _as_bytes(weight), _as_bytes(offset), _as_bytes(scale), _as_bytes(out)
    _on_threads(lambda part: _signround.codes(kernel, *(b[part(b)] for b in buffers)), scale.numel())


def step(weight: Tensor, offset: Tensor, scale: Tensor, grad: Tensor, size: int, sums: Tensor, kernel: str) -> None:
    """Moves offset int16 [N, K] and fills sums float32 [N, K/128]; grad bfloat16 [N, K]."""
    buffers = [_as_bytes(x) for x in (weight, offset, scale, grad, sums)]
    _on_threads(lambda part: _signround.step(kernel, size, *(b[part(b)] for b in buffers)), scale.numel())


def _as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.detach().view(torch.uint8).view(-1).numpy()
    return array


def _on_threads(work: Callable[[Callable[[NDArray[np.uint8]], slice]], None], groups: int) -> None:
    """work(part) for pieces of the groups, on as many threads as torch uses; part(buffer) is the slice of a buffer that they are."""

    def piece(start: int) -> None:
        end = min(start + PIECE_GROUPS, groups)
        work(lambda buffer: slice(len(buffer) // groups * start, len(buffer) // groups * end))

    starts = range(0, groups, PIECE_GROUPS)
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        for start in starts:
            piece(start)
    else:
        list(_pool(threads).map(piece, starts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that stay: a block of layers has thousands of calls."""
    return ThreadPoolExecutor(threads, "signround")
