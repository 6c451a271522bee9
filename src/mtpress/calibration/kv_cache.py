"""The scales of an FP8 KV cache: what a full-attention layer puts into its cache, and the two numbers that vLLM reads of it.

In: keys and values as transformers hands them to a cache, keys behind their norm and RoPE, which is also what vLLM stores and what
modelopt 0.47's k_bmm_quantizer sees. Out: `self_attn.k_proj.k_scale` and `self_attn.v_proj.v_scale` of each full-attention layer,
float32, amax / 448, names and arithmetic of modelopt 0.47. Leaves out: declaring the cache (quantization/output_files.py), and the
draft head, whose tensors stay as they are in the source: vLLM takes the scale 1 for it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mtpress.errors import InputError
from mtpress.formats.kv_cache import E4M3_MAX, K_SCALE, V_SCALE

if TYPE_CHECKING:
    import torch

    from mtpress.calibration.samples import InputAmax


def scales(names: "list[str]", seen: "InputAmax") -> "dict[str, torch.Tensor]":
    """Output name → float32 scalar, of the largest |k| and |v| that the samples put into a layer's cache."""
    import torch

    found = {}
    for name in names:
        amax = seen.of_group([name.split(".layers.", 1)[1].split(".", 1)[1]])
        if not bool(torch.isfinite(amax)):
            raise InputError(f"{name}: the cache of the calibration samples holds {float(amax)}; the source weights are damaged")
        found[name] = torch.where(amax == 0, 1.0, amax / E4M3_MAX)  # vLLM stops at a scale of 0
    return found


class SeenCache:
    """Stands where an attention layer expects its cache: what would be stored is seen, and given back as it is."""

    def __init__(self, seen: "Callable[[str, torch.Tensor], None]") -> None:
        self.seen = seen

    def update(self, keys: "torch.Tensor", values: "torch.Tensor", *_: Any) -> "tuple[torch.Tensor, torch.Tensor]":
        self.seen(K_SCALE, keys)
        self.seen(V_SCALE, values)
        return keys, values
