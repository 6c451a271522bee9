"""Which device a stage computes on."""

from typing import TYPE_CHECKING

from mtpress.errors import ResourceError

if TYPE_CHECKING:
    import torch


def choose_device(name: str) -> "torch.device":
    """The torch device of --device: auto takes a CUDA GPU where there is one; ResourceError for a GPU that is not there."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
