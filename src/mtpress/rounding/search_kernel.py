"""The compiled search on tensors and threads: the bits of search.py's eager definition, some hundred times as fast.

In: a contiguous BF16 matrix on the CPU. Out: what search.py documents. Leaves out: the arithmetic, which search.py defines
and formats/_int4_search.c repeats. The extension is optional: without it KERNELS is empty and search.py does the work itself.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from mtpress.formats.int4 import GROUP_SIZE

try:
    from mtpress.formats import _int4_search
except ImportError:
    KERNELS: tuple[str, ...] = ()
else:
    KERNELS = _int4_search.LEVELS  # the instruction sets of this machine that it is compiled for, best first

PIECE_GROUPS = 1 << 13  # about five milliseconds: threads that are held up elsewhere leave their pieces to the others


def takes(weight: torch.Tensor) -> bool:
    """Whether the kernel is there and can read this matrix."""
    readable = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.numel() > 0
    return readable and bool(KERNELS)


def search(weight: torch.Tensor, factors: torch.Tensor, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of a matrix that the kernel takes; ValueError where KERNELS has no such kernel."""
    n, k = weight.shape
    assert k % GROUP_SIZE == 0
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, k // GROUP_SIZE, dtype=torch.float16)
    weight_bytes, code_bytes, scale_bytes, factor_bytes = (_as_bytes(tensor) for tensor in (weight, codes, scales, factors))

    def piece(start: int) -> None:
        end = min(start + PIECE_GROUPS, scales.numel())
        into = code_bytes[start * GROUP_SIZE : end * GROUP_SIZE], scale_bytes[2 * start : 2 * end]
        _int4_search.search(kernel, weight_bytes[2 * start * GROUP_SIZE : 2 * end * GROUP_SIZE], *into, factor_bytes)

    starts = range(0, scales.numel(), PIECE_GROUPS)
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        for start in starts:
            piece(start)
    else:
        with ThreadPoolExecutor(threads, "int4-search") as pool:
            list(pool.map(piece, starts))
    return codes, scales


def _as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.detach().view(torch.uint8).view(-1).numpy()
    return array
