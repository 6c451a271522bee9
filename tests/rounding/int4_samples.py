"""Matrices for the tests of INT4 rounding: two distributions, and groups on which scales go wrong."""

import math

import torch
from torch import Tensor

GROUP = 128


def sample(kind: str, rows: int, columns: int = 2 * GROUP, spread: float = 0.02, seed: int = 0) -> Tensor:
    """BF16 [rows, columns], "normal" or "laplace"."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "normal":
        return (spread * torch.randn(rows, columns, generator=generator)).bfloat16()
    uniform = torch.rand(rows, columns, generator=generator).clamp(min=1e-7) - 0.5
    return (-spread * uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-7).log()).bfloat16()


def hard(finite: bool = True) -> Tensor:
    """BF16 [32, 256]: in each row one group that is hard to scale and an ordinary one."""
    matrix = sample("normal", 32, seed=7)
    groups = matrix.view(-1, GROUP)[::2]
    groups[0] = 0
    groups[1] = -0.0
    groups[2] *= 1e-4  # scales among FP16's subnormal numbers
    groups[3] *= 1e-7  # below them
    groups[4] = 1e-39  # a subnormal BF16 number
    groups[5] = 1
    groups[6] = -1
    groups[7] = 0
    groups[7, 5] = -3
    groups[8] = 0
    groups[8, 127] = 3
    groups[9, ::2], groups[9, 1::2] = 0.5, -0.5  # either sign is as large
    groups[10] = torch.arange(GROUP) - 64
    groups[11] = 65504 * 7
    groups[12, 0] = 1e4  # everything else is nothing beside it
    if not finite:
        groups[13, 3] = math.inf
        groups[14, 3] = -math.inf
        groups[15, 3] = math.nan
    return matrix


def relative_mse(weight: Tensor, codes: Tensor, scales: Tensor) -> float:
    """Energy of the rounding error over that of the matrix, in float64."""
    found = (codes.double() - 8).unflatten(-1, (-1, GROUP)) * scales.double().unsqueeze(-1)
    return float((found.flatten(-2) - weight.double()).square().sum() / weight.double().square().sum())
