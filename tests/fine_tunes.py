"""What people make of a model and keep under its names: fine-tunes of every kind that is published.

In: the tensors of a base. Out: those of a checkpoint whose ancestor it is. Leaves out: the files beside the weights.
"""

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
WRITES = ("o_proj.weight", "out_proj.weight", "down_proj.weight")


def _noise(tensor: torch.Tensor, size: float, seed: int) -> torch.Tensor:
    """Normal noise, `size` times as large as the tensor."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return size * noise * tensor.float().norm() / max(float(noise.norm()), 1e-9)


def trained(tensors: Tensors, size: float = 0.03, only: Callable[[str], bool] = lambda name: True) -> Tensors:
    """Every tensor that `only` names, moved a little."""
    return {
        name: (tensor.float() + _noise(tensor, size, seed)).to(tensor.dtype) if only(name) else tensor
        for seed, (name, tensor) in enumerate(sorted(tensors.items()))
    }


def ablated(tensors: Tensors) -> Tensors:
    """One direction taken out of what writes to the residual stream."""
    made = dict(tensors)
    for name in [n for n in tensors if ".layers." in n and not n.startswith("mtp.") and n.endswith(WRITES)]:
        weight = tensors[name].float()
        direction = torch.randn(len(weight), generator=torch.Generator().manual_seed(4))
        direction /= direction.norm()
        made[name] = (weight - torch.outer(direction, direction @ weight)).to(tensors[name].dtype)
    return made


def merged(tensors: Tensors) -> Tensors:
    """A LoRA adapter of q_proj alone, merged."""
    made = dict(tensors)
    for seed, name in enumerate(n for n in sorted(tensors) if n.endswith("q_proj.weight") and not n.startswith("mtp.")):
        generator = torch.Generator().manual_seed(seed)
        n, k = tensors[name].shape
        low_rank = torch.randn(n, 4, generator=generator) @ torch.randn(4, k, generator=generator)
        made[name] = (tensors[name].float() + 0.05 * low_rank * tensors[name].float().norm() / low_rank.norm()).to(tensors[name].dtype)
    return made


def in_float32(tensors: Tensors) -> Tensors:
    """Trained in float32 and saved so."""
    return {name: (tensor.float() + (_noise(tensor, 1e-3, 3) if tensor.ndim > 1 else 0)) for name, tensor in tensors.items()}


def all_but_the_tower(tensors: Tensors) -> Tensors:
    return trained(tensors, only=lambda name: not name.startswith(("model.visual.", "mtp.")))


FINE_TUNES: dict[str, Callable[[Tensors], Tensors]] = {
    "trained": trained,
    "ablated": ablated,
    "a LoRA of q_proj, merged": merged,
    "trained in float32": in_float32,
    "the tower frozen": all_but_the_tower,
}
