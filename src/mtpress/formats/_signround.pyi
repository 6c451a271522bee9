import numpy as np
from numpy.typing import NDArray

LEVELS: tuple[str, ...]

Bytes = NDArray[np.uint8]

def dequantize(level: str, weight: Bytes, offset: Bytes, scale: Bytes, out: Bytes, /) -> None: ...
def codes(level: str, weight: Bytes, offset: Bytes, scale: Bytes, out: Bytes, /) -> None: ...
def step(level: str, step: int, weight: Bytes, offset: Bytes, scale: Bytes, grad: Bytes, sums: Bytes, /) -> None: ...
