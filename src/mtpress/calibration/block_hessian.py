"""Second moments of what a linear reads, in blocks of 16 along K: the local Hessian that weights rounding errors.

In: the inputs of a linear, sample by sample, in any order and on any worker. Out: one sum over all samples. Leaves out: what
rounding makes of it (rounding/).

Sums of floating-point numbers depend on their order. So what a sample adds is cut into a whole number and a multiple of 2⁻³²,
and these are added up each for itself: as long as neither sum has more than 53 bits, both are exact, and any way of dealing the
samples out gives the same bits. That holds for Σ x² up to 9·10¹⁵ and two million samples. Memory: two sums a linear, however many
samples there are.
"""

from collections.abc import Mapping

import torch

BLOCK = 16
PIECE_TOKENS = 128  # whose float32 copy stays in the processor's caches
FRACTIONS = 2.0**32

Parts = tuple[torch.Tensor, torch.Tensor]  # whole numbers and fractions, float64 [K/16, 16, 16] on the CPU


class InputHessian:
    """Sums by linear."""

    def __init__(self) -> None:
        self.parts: dict[str, Parts] = {}

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """Takes in Σ x xᵀ over the tokens of a sample, inputs [..., K] with K a multiple of 16."""
        found = torch.zeros(inputs.shape[-1] // BLOCK, BLOCK, BLOCK, dtype=torch.float64, device=inputs.device)
        for piece in torch.split(inputs.reshape(-1, inputs.shape[-1]), PIECE_TOKENS):
            tokens = piece.view(len(piece), -1, BLOCK).transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
            found += tokens.mT @ tokens
        found = found.cpu()
        whole = found.round()
        self._take(name, (whole, ((found - whole) * FRACTIONS).round() / FRACTIONS))

    def merge(self, parts: Mapping[str, Parts]) -> None:
        """Takes in the sums of another share; no sample may be in both."""
        for name, theirs in parts.items():
            self._take(name, theirs)

    def _take(self, name: str, theirs: Parts) -> None:
        mine = self.parts.get(name)
        self.parts[name] = theirs if mine is None else (mine[0] + theirs[0], mine[1] + theirs[1])

    def total(self, name: str) -> torch.Tensor:
        """Σ x xᵀ over all samples, float64 [K/16, 16, 16]."""
        whole, fractions = self.parts[name]
        return whole + fractions
