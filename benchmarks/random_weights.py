"""Random weights with the spread of trained ones, made in pieces, faster than a disk takes them.

In: a seed, and the name and shape of a tensor. Out: its values as BF16 pieces of whole rows; equal seeds and names give
equal values whatever else was made before. Leaves out: which tensors there are (full_size.py).

A matrix has the standard deviation 1/√fan-in, tails of Student's t with 6 degrees of freedom (excess kurtosis 3), and a
few input channels 8 to 20 times as large as the rest. Projections back into the residual stream are smaller by √(2·layers),
so that activations neither grow nor vanish with depth. Norms sit around the identity: 0 for Qwen's 1+w, 1 for the rest.
"""

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch

POOL_VALUES = 1 << 22
RUN = 128  # values copied from the pool at a time: shorter runs cost speed, longer ones repeat more of a neighbour row
PIECE_VALUES = 1 << 22
OUTLIERS = 4
OUTLIER_SIZE = (8.0, 20.0)
INTO_RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "attn.proj.weight")
PLAIN_NORMS = ("linear_attn.norm.weight", "norm1.weight", "norm2.weight", "merger.norm.weight")


class RandomWeights:
    """Drawing every value would take half an hour at 27B: a pool is drawn once, and tensors are runs of it in random order."""

    def __init__(self, seed: int, num_layers: int) -> None:
        self.seed = seed
        self.num_layers = num_layers
        drawn = np.random.default_rng(seed).standard_t(6, POOL_VALUES + RUN)
        self.pool = torch.from_numpy(drawn / math.sqrt(6 / 4)).to(torch.bfloat16)

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """BF16 pieces [rows, …] of a tensor, in order; each owns its memory."""
        digest = hashlib.sha256(name.encode()).digest()
        rng = np.random.default_rng([self.seed, int.from_bytes(digest[:16], "little")])
        if len(shape) == 1:
            yield vector(rng, name, shape[0])
            return
        fan_in = math.prod(shape[1:])
        scale = self._column_scale(rng, name, fan_in)
        for start in range(0, shape[0], max(1, PIECE_VALUES // fan_in)):
            rows = min(max(1, PIECE_VALUES // fan_in), shape[0] - start)
            yield (self._runs(rng, rows * fan_in).view(rows, fan_in) * scale).view(rows, *shape[1:])

    def _runs(self, rng: np.random.Generator, count: int) -> torch.Tensor:
        shift = int(rng.integers(RUN))
        choice = torch.from_numpy(rng.integers(0, POOL_VALUES // RUN, -(-count // RUN)))
        return self.pool[shift : shift + POOL_VALUES].view(-1, RUN).index_select(0, choice).view(-1)[:count]

    def _column_scale(self, rng: np.random.Generator, name: str, fan_in: int) -> torch.Tensor:
        """What each input channel is multiplied by, BF16 [fan_in]."""
        if name.endswith(("embed_tokens.weight", "pos_embed.weight")):
            return torch.full((fan_in,), 0.02, dtype=torch.bfloat16)
        scale = np.ones(fan_in)
        if fan_in >= 16 * OUTLIERS:
            scale[rng.choice(fan_in, OUTLIERS, replace=False)] = rng.uniform(*OUTLIER_SIZE, OUTLIERS)
        scale /= np.linalg.norm(scale)
        if name.endswith(INTO_RESIDUAL) or ("blocks." in name and name.endswith("linear_fc2.weight")):
            scale /= math.sqrt(2 * self.num_layers)
        return torch.from_numpy(scale).to(torch.bfloat16)


def vector(rng: np.random.Generator, name: str, size: int) -> torch.Tensor:
    """A norm, a bias, or one of the two vectors that set how fast a Gated-DeltaNet head forgets."""
    if name.endswith("A_log"):
        values = np.log(rng.uniform(1.0, 16.0, size))
    elif name.endswith("dt_bias"):  # softplus⁻¹ of a time step between 0.001 and 0.1
        step = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), size))
        values = step + np.log(-np.expm1(-step))
    elif name.endswith(".bias"):
        values = 0.02 * rng.standard_normal(size)
    else:
        centre = 1.0 if name.endswith(PLAIN_NORMS) else 0.0
        values = centre + 0.1 * rng.standard_normal(size)
    return torch.from_numpy(values).to(torch.bfloat16)
