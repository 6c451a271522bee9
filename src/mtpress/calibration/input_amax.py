"""input_scale of linears that read the same input, by what the samples showed."""

from collections.abc import Sequence

import torch

from mtpress.calibration.samples import InputAmax
from mtpress.checkpoint.shard_writer import not_finite
from mtpress.errors import InputError
from mtpress.formats import nvfp4


def input_scale(seen: InputAmax, names: Sequence[str]) -> torch.Tensor:
    """float32 scalar for linears that read the same input; names within their layer."""
    amax = group_amax(seen, names)
    # a dead linear reads only zeros: modelopt 0.47 takes the amax 6 for it
    return nvfp4.global_scale(torch.where(amax == 0, nvfp4.E2M1_MAX, amax))


def group_amax(seen: InputAmax, names: Sequence[str]) -> torch.Tensor:
    """The largest |x| that the linears of a group read; InputError where it is not finite."""
    amax = seen.of_group(names)
    if not bool(torch.isfinite(amax)):
        raise InputError(f"{names[0]}: the calibration activations are {float(amax)}; the source weights are damaged")
    return amax


def within_layer(module: str) -> str:
    return module.split(".layers.", 1)[1].split(".", 1)[1]


def damaged(module: str) -> InputError:
    return not_finite(f"{module}.weight")
