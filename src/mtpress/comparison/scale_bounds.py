"""How large the numbers can be that a stored scale was measured on, by the weights that make them.

In: a subject and, where there is one, the base of its weights. Out: for every scale of inputs, and of keys and values, its `Bounds`: the
largest |x| that the scale stands for, and between what that must lie. Leaves out: judging (rules/scale_bounds.py).

The input of most linears is normed: x = x̂ (1 + w) with an RMS of x̂ of 1 over K channels, so that the largest |x| of any sample lies
between the RMS of the gain and √K times its largest. What other linears read is bounded by the rows of the matrices that make it, of
which some are read: a row v of a linear behind that norm gives |v·x| about ‖v (1 + w)‖ and never more than √K times that.
In mtpress-tiny the largest |x| is 4.4 to 6 times the lower bound of normed inputs, and 7 to 270 times that of the others.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo, read_rows, read_tensor
from mtpress.comparison.weights import counterpart, counterparts
from mtpress.formats.kv_cache import K_SCALE, V_SCALE
from mtpress.quant_config.stored import INPUT_GLOBAL_SCALE, INPUT_SCALE, KV_SCALES
from mtpress.quant_config.view import Subject

if TYPE_CHECKING:
    import torch

NUM_ROWS = 64  # of a matrix that are read
NVFP4_RANGE, E4M3_MAX = 6.0 * 448.0, 448.0  # amax = scale times this
LAYER = re.compile(r"^(.*layers\.\d+\.)(.+)$")
AFTER_INPUT_NORM = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z",
    "linear_attn.in_proj_a", "linear_attn.in_proj_b",
)  # fmt: skip
AFTER_MLP_NORM = ("mlp.gate_proj", "mlp.up_proj")
# What of a lower bound is asked: a normed input reaches four times the RMS of its gain in any one token; gates can close.
NORMED, CACHED, GATED, PRODUCT = 1.5, 0.7, 0.1, 1.0


@dataclass(frozen=True)
class Bounds:
    """amax: what the scale stands for; low, high: between what the weights let it lie. kind: the linear, without its layer."""

    kind: str
    amax: float
    low: float
    high: float


@dataclass
class ScaleBounds:
    """bounds: scale → its bounds. unbounded: scales of which the weights say nothing. constant: whether all input scales are one number,
    as in a build without samples."""

    bounds: dict[str, Bounds]
    unbounded: list[str]
    constant: bool


class _Weights:
    """Norms and rows of matrices in float32: as stored here in 16 or 32 bits, else as the base has them."""

    def __init__(self, subject: Subject, base: Checkpoint | None) -> None:
        self.subject = subject
        self.theirs: Mapping[str, TensorInfo] = counterparts(base) if base is not None else {}
        self.cached: dict[str, torch.Tensor | None] = {}

    def _find(self, name: str) -> TensorInfo | None:
        for info in (self.subject.tensors.get(name), counterpart(name, self.theirs)):
            if info is not None and info.dtype in ("BF16", "F16", "F32") and info.num_params:
                return info
        return None

    def vector(self, name: str, shift: float = 0.0) -> "torch.Tensor | None":
        """shift + w; None where it is missing or not finite."""
        info = self._find(name)
        if info is None or len(info.shape) != 1:
            return None
        found = read_tensor(info).float() + shift
        return found if bool(found.isfinite().all()) else None

    def rows(self, name: str, gain: "torch.Tensor") -> "torch.Tensor | None":
        """‖v · gain‖ of some rows v of a matrix, [rows]."""
        import torch

        if name not in self.cached:
            info = self._find(name)
            self.cached[name] = None
            if info is not None and len(info.shape) == 2 and info.shape[1] == len(gain):
                chosen = torch.linspace(0, info.shape[0] - 1, min(NUM_ROWS, info.shape[0])).long()
                norms = torch.linalg.vector_norm(read_rows(info, chosen).float() * gain, dim=1)
                self.cached[name] = norms if bool(norms.isfinite().all()) else None
        return self.cached[name]


def scale_bounds(subject: Subject, base: Checkpoint | None = None) -> ScaleBounds:
    """Of every scale of activations that is stored and sound; reads the norms, and some rows of each matrix that is needed."""
    found = ScaleBounds({}, [], False)
    weights = _Weights(subject, base)
    scales = dict(_amax(subject))
    for name, amax in scales.items():
        bounds = _bounds(weights, name)
        if bounds is None:
            found.unbounded.append(name)
        else:
            kind, low, high = bounds
            found.bounds[name] = Bounds(kind, amax, low, high)
    inputs = {subject.scalars[name] for name in scales if name.endswith((INPUT_SCALE, INPUT_GLOBAL_SCALE))}
    found.constant = len(inputs) == 1 and len(scales) > 2
    return found


def _amax(subject: Subject) -> Iterator[tuple[str, float]]:
    """Scale → the largest |x| that it stands for."""
    for name, value in subject.scalars.items():
        module, _, suffix = name.rpartition(".")
        if not 0 < value < float("inf"):
            continue
        if suffix == INPUT_SCALE:
            yield name, value * (E4M3_MAX if subject.form(module) == "fp8" else NVFP4_RANGE)
        elif suffix == INPUT_GLOBAL_SCALE:
            yield name, NVFP4_RANGE / value
        elif suffix in KV_SCALES:
            yield name, value * E4M3_MAX


def _bounds(weights: _Weights, name: str) -> tuple[str, float, float] | None:
    """(the linear, low, high); None where nothing is known."""
    module, _, suffix = name.rpartition(".")
    split = LAYER.match(module)
    if split is None:
        if module != "lm_head" or weights.subject.prefix is None:
            return None
        gain = weights.vector(f"{weights.subject.prefix}norm.weight", 1.0)
        return None if gain is None else (module, *_normed(gain, NORMED))
    layer, linear = split[1], split[2]
    if suffix == KV_SCALES[0]:
        gain = weights.vector(f"{layer}self_attn.k_norm.weight", 1.0)
        return None if gain is None else (K_SCALE, *_normed(gain, CACHED))
    norm = "post_attention_layernorm" if linear.startswith("mlp.") else "input_layernorm"
    gain = weights.vector(f"{layer}{norm}.weight", 1.0)
    if gain is None:
        return None
    if suffix == KV_SCALES[1]:
        low_high = _read(weights, layer, gain, "self_attn.v_proj", CACHED)
        return None if low_high is None else (V_SCALE, *low_high)
    if linear in (*AFTER_INPUT_NORM, *AFTER_MLP_NORM):
        return linear, *_normed(gain, NORMED)
    made = _made(weights, layer, linear, gain)
    return None if made is None else (linear, *made)


def _made(weights: _Weights, layer: str, linear: str, gain: "torch.Tensor") -> tuple[float, float] | None:
    """Of a linear behind attention, a delta rule or the product of an MLP."""
    if linear == "self_attn.o_proj":  # a mean of values, times a sigmoid
        return _read(weights, layer, gain, "self_attn.v_proj", GATED)
    if linear == "linear_attn.out_proj":  # a norm over a head, times silu(z)
        inner = weights.vector(f"{layer}linear_attn.norm.weight")
        gates = _read(weights, layer, gain, "linear_attn.in_proj_z", PRODUCT)
        if inner is None or gates is None:
            return None
        low, high = _normed(inner, 1.0)
        return low * gates[0], high * gates[1]
    if linear == "mlp.down_proj":
        parts = [_read(weights, layer, gain, part, 1.0) for part in AFTER_MLP_NORM]
        if parts[0] is None or parts[1] is None:
            return None
        return PRODUCT * parts[0][0] * parts[1][0], parts[0][1] * parts[1][1]
    return None


def _normed(gain: "torch.Tensor", asked: float) -> tuple[float, float]:
    rms = float(gain.square().mean().sqrt())
    return asked * rms, float(gain.abs().max()) * len(gain) ** 0.5


def _read(weights: _Weights, layer: str, gain: "torch.Tensor", linear: str, asked: float) -> tuple[float, float] | None:
    """Of what a linear behind a norm gives: some of its rows, the largest of which may not be among them."""
    rows = weights.rows(f"{layer}{linear}.weight", gain)
    return None if rows is None else (asked * float(rows.median()), 4 * float(rows.max()) * len(gain) ** 0.5)
