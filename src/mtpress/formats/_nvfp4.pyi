import numpy as np
from numpy.typing import NDArray

LEVELS: tuple[str, ...]

def pack(
    level: str, scale_2: float, given: bool, weight: NDArray[np.uint8], packed: NDArray[np.uint8], scales: NDArray[np.uint8], /
) -> None: ...
def search(
    level: str,
    scale_2: float,
    below: int,
    above: int,
    blocks: int,
    weight: NDArray[np.uint8],
    forms: NDArray[np.uint8],
    scales: NDArray[np.uint8],
    /,
) -> None: ...
def amax(level: str, weight: NDArray[np.uint8], /) -> int: ...
