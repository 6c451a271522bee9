"""Second moments of what a linear reads, in blocks of 16 along K: the local Hessian that weights rounding errors.

In: the inputs of a linear, sample by sample, in any order and on any worker. Out: one sum over all samples. Leaves out: what
rounding makes of it (rounding/).

Sums of floating-point numbers depend on their order, so a share keeps one partial sum a sample, and the total adds them in
order of sample number: any way of dealing the samples out gives the same bits.
"""

from collections.abc import Mapping

import torch

BLOCK = 16


class InputHessian:
    """Partial sums by linear and sample: float64 [K/16, 16, 16], on the CPU."""

    def __init__(self) -> None:
        self.partial: dict[str, dict[int, torch.Tensor]] = {}

    def add(self, name: str, sample: int, inputs: torch.Tensor) -> None:
        """Takes in Σ x xᵀ over the tokens of a sample, inputs [..., K] with K a multiple of 16."""
        tokens = inputs.reshape(-1, inputs.shape[-1] // BLOCK, BLOCK).double().transpose(0, 1)
        found = (tokens.mT @ tokens).cpu()
        partial = self.partial.setdefault(name, {})
        partial[sample] = partial[sample] + found if sample in partial else found

    def merge(self, other: Mapping[str, Mapping[int, torch.Tensor]]) -> None:
        """Takes in the partial sums of another share; no sample may be in both."""
        for name, samples in other.items():
            partial = self.partial.setdefault(name, {})
            assert not partial.keys() & samples.keys(), f"{name}: a sample was counted twice"
            partial |= samples

    def total(self, name: str) -> torch.Tensor:
        """Σ x xᵀ over all samples, float64 [K/16, 16, 16], added in order of sample number."""
        samples = self.partial[name]
        total = torch.zeros_like(next(iter(samples.values())))
        for number in sorted(samples):
            total += samples[number]
        return total
