"""The compiled kernels of INT4 on tensors and threads: the bits of the eager definitions, the search some hundred times as fast.

In: a contiguous BF16 matrix on the CPU, or codes. Out: what rounding/search.py, rounding/rtn.py and formats/int4.py document. Leaves
out: the arithmetic, which they define and _int4.c repeats. The extension is optional: without it KERNELS is empty and they do the
work themselves.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

try:
    from mtpress.formats import _int4
except ImportError:
    KERNELS: tuple[str, ...] = ()
else:
    KERNELS = _int4.LEVELS  # the instruction sets of this machine that it is compiled for, best first

GROUP_SIZE, PER_WORD = 128, 8
ROWS = 16  # that the kernel packs side by side
# a few milliseconds of work each: threads that are held up elsewhere leave their pieces to the others
PIECE_GROUPS = 1 << 13
PIECE_CODES = 4 << 20


def takes(weight: torch.Tensor) -> bool:
    """Whether the kernel is there and can read this matrix."""
    readable = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.is_contiguous() and weight.numel() > 0
    return readable and bool(KERNELS)


def round_matrix(
    weight: torch.Tensor, factors: torch.Tensor | None, kernel: str, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of a matrix that the kernel takes; ValueError where KERNELS has no such kernel.

    factors: of the search; None for plain rounding. importance: float32 [K] on the CPU, for the search.
    """
    n, k = weight.shape
    assert k % GROUP_SIZE == 0
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, k // GROUP_SIZE, dtype=torch.float16)
    weight_bytes, code_bytes, scale_bytes = (_as_bytes(tensor) for tensor in (weight, codes, scales))
    factor_bytes, importance_bytes = (_as_bytes(torch.empty(0) if x is None else x) for x in (factors, importance))

    def some(start: int, end: int) -> None:
        into = code_bytes[start * GROUP_SIZE : end * GROUP_SIZE], scale_bytes[2 * start : 2 * end]
        _int4.round(kernel, weight_bytes[2 * start * GROUP_SIZE : 2 * end * GROUP_SIZE], *into, factor_bytes, importance_bytes, start)

    _on_threads(some, scales.numel(), PIECE_GROUPS)
    return codes, scales


def pack(codes: torch.Tensor, kernel: str) -> torch.Tensor:
    """qweight int32 [K/8, N] of contiguous codes uint8 [N, K] on the CPU."""
    n, k = codes.shape
    words = torch.empty(k // PER_WORD, n, dtype=torch.int32)
    code_bytes, word_bytes = _as_bytes(codes), _as_bytes(words)
    _on_threads(lambda start, end: _int4.pack(kernel, code_bytes, word_bytes, k, start, end), n, max(1, PIECE_CODES // k // ROWS) * ROWS)
    return words


def _as_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    array: NDArray[np.uint8] = tensor.detach().view(-1).view(torch.uint8).numpy()
    return array


def _on_threads(work: Callable[[int, int], None], count: int, piece: int) -> None:
    """work(start, end) for pieces of what there is, on as many threads as torch uses; the kernel runs without the interpreter lock."""
    starts = range(0, count, piece)
    ends = [min(start + piece, count) for start in starts]
    threads = min(torch.get_num_threads(), len(starts))
    if threads <= 1:
        for start, end in zip(starts, ends, strict=True):
            work(start, end)
    else:
        with ThreadPoolExecutor(threads, "int4") as pool:
            list(pool.map(work, starts, ends))
