"""Matrices for the tests of NVFP4's block scales: two distributions, blocks on which scales go wrong, and errors in float64."""

import torch
from torch import Tensor

from mtpress.formats import nvfp4

BLOCK = nvfp4.GROUP_SIZE
SHAPES = ("normal", "laplace", "uniform", "outlier", "one value", "grid", "spread")


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, BLOCK, generator=torch.Generator().manual_seed(seed))


def laplace(count: int, seed: int = 0) -> Tensor:
    uniform = torch.rand(count, BLOCK, generator=torch.Generator().manual_seed(seed)).clamp(min=1e-7) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-7).log()


def blocks(shape: str, count: int, seed: int = 0) -> Tensor:
    """BF16 [count, 16] of one of SHAPES; from the third on, largest magnitudes from 1 to 2⁻¹⁷: scales are subnormal too."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator)

    if shape == "normal":
        return normal(count, seed).bfloat16()
    if shape == "laplace":
        return laplace(count, seed).bfloat16()
    if shape == "uniform":
        found = rand(count, BLOCK)
    elif shape == "outlier":
        found = normal(count, seed)
        found[:, 3] *= 100
    elif shape == "one value":  # beside the largest: where the best scale is furthest from it
        found = (rand(count, 1) * (1 + 0.02 * normal(count, seed))).abs().clamp(max=1)
        found[:, 0] = 1
    elif shape == "grid":  # errors that are zero, and ties
        found = torch.tensor(nvfp4.E2M1_VALUES)[torch.randint(0, 8, (count, BLOCK), generator=generator)] * (0.05 + rand(count, 1))
    else:
        found = normal(count, seed) * 2.0 ** torch.randint(-12, 1, (count, BLOCK), generator=generator)
    largest = found.abs().amax(1, keepdim=True).clamp(min=1e-9)
    found = found / largest * 2.0 ** (-17 * rand(count, 1))
    found[0, 0] = 1  # what the global scale is made of
    return found.bfloat16()


def special() -> dict[str, Tensor]:
    """Finite BF16 matrices with blocks of zeros, subnormal numbers and the ends of the range."""
    mixed = blocks("normal", 8)
    mixed[1] = 0
    mixed[2] = -0.0
    mixed[3] *= 1e-4
    mixed[4] *= 1e-30
    mixed[5] = 3.0
    return {
        "mixed": mixed,
        "zeros": torch.zeros(2, BLOCK, dtype=torch.bfloat16),
        "subnormal": blocks("normal", 8) * 1e-39,
        "tiny": blocks("normal", 8) * 1e-35,
        "huge": (blocks("uniform", 8) * 3e38).bfloat16(),
    }


def relative_mse(weight: Tensor, parts: dict[str, Tensor]) -> float:
    """Energy of the rounding error over that of the matrix, in float64."""
    exact, error = weight.double(), error_of(weight, parts)
    return float(error.square().sum() / exact.square().sum())


def error_of(weight: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """float64 [N, K]: what is stored less what was, by the layout's definition and not by mtpress's dequantize."""
    values = torch.tensor([*nvfp4.E2M1_VALUES, *(-v for v in nvfp4.E2M1_VALUES)], dtype=torch.float64)
    codes = torch.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).flatten(-2)
    scales = parts["weight_scale"].double().repeat_interleave(BLOCK, 1) * parts["weight_scale_2"].double()
    return values[codes.long()] * scales - weight.double()
