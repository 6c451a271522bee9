"""H = Σ x xᵀ of what a linear reads, whole: the second moments between all of its inputs.

In: the inputs of a linear, sample by sample, in any order. Out: one float32 matrix [K, K]. Leaves out: what is made of it
(rounding/gptq.py); calibration/block_hessian.py has the blocks of 16 along its diagonal, in float64.

Sums of floating-point numbers depend on their order, and a matrix a sample would not fit into memory. So samples are added in order of
their numbers whatever order they come in: the inputs of one that comes early wait. The same samples give the same bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TOKENS = 2048  # of a sample that are multiplied at a time
PANEL = 1024  # columns: what lies above the diagonal is not computed twice


class FullHessian:
    """add() for each of the samples, once, then total()."""

    def __init__(self, size: int, samples: Sequence[int], device: torch.device) -> None:
        self._sum = torch.zeros(size, size, device=device)
        self._expected = sorted(samples, reverse=True)
        self._waiting: dict[int, Tensor] = {}

    def add(self, sample: int, inputs: Tensor) -> None:
        """Takes in all tokens of a sample, inputs [..., K]."""
        assert sample in self._expected and sample not in self._waiting
        self._waiting[sample] = inputs.reshape(-1, inputs.shape[-1])
        while self._expected and self._expected[-1] in self._waiting:
            tokens = self._waiting.pop(self._expected.pop())
            for first in range(0, len(tokens), TOKENS):
                x = tokens[first : first + TOKENS].float()
                for start in range(0, x.shape[1], PANEL):
                    self._sum[start:, start : start + PANEL].addmm_(x[:, start:].t(), x[:, start : start + PANEL])

    def total(self) -> Tensor:
        """float32 [K, K], symmetric to the bit; the sum is handed over."""
        assert not self._expected
        for start in range(0, len(self._sum), PANEL):
            panel = slice(start, start + PANEL)
            self._sum[panel, start + PANEL :] = self._sum[start + PANEL :, panel].t()
            self._sum[panel, panel] = self._sum[panel, panel].tril() + self._sum[panel, panel].tril(-1).t()
        return self._sum
