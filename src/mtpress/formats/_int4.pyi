import numpy as np
from numpy.typing import NDArray

LEVELS: tuple[str, ...]

def round(
    level: str,
    weight: NDArray[np.uint8],
    codes: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    factors: NDArray[np.uint8],
    importance: NDArray[np.uint8],
    first: int,
    /,
) -> None: ...
def pack(level: str, codes: NDArray[np.uint8], words: NDArray[np.uint8], k: int, first: int, last: int, /) -> None: ...
