import numpy as np
from numpy.typing import NDArray

LEVELS: tuple[str, ...]

def search(
    level: str, weight: NDArray[np.uint8], codes: NDArray[np.uint8], scales: NDArray[np.uint8], factors: NDArray[np.uint8], /
) -> None: ...
