"""Which tensor of a checkpoint in NVFP4, FP8 or both becomes which in the other layout, modelopt's or compressed-tensors'.

In: a checkpoint and the layout it is to have. Out: a `Conversion`: its quantized linears, and of fused linears with unequal global
scales what one scale costs; then the changes, put into a Revision. Leaves out: which kind each linear is (conversion_kinds.py), the
config files and the order of work (stages/convert.py), the arithmetic (formats/compressed_tensors.py, formats/nvfp4_rescale.py).

Codes and block scales go over byte for byte; only fused NVFP4 linears whose members do not share one global scale get new block scales,
because an engine would take one global scale for all of them and multiply the others' weights by the ratio. The members of a fused FP8
linear keep their scales: vLLM makes them equal in the same way in both layouts.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.revision import Revision
from mtpress.checkpoint.safetensors import TensorInfo, read_tensor, torch_dtype
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.errors import InputError
from mtpress.formats import compressed_tensors, fp8, nvfp4
from mtpress.formats.mixed_precision import NVFP4
from mtpress.formats.nvfp4_rescale import Member, best_shared_scale, energies, reexpress
from mtpress.models.qwen3_5.names import FUSED
from mtpress.quant_config.conversion_kinds import FP8_SCALE_DTYPES, KINDS, SCALAR_SHAPE, Layout, fp8_scale_shape, kinds_of, layout_of, title
from mtpress.quant_config.stored import KV_SCALES
from mtpress.quant_config.view import Subject

# Role → suffix in each layout. A role has the name that modelopt's suffix has.
SUFFIX: dict[Layout, dict[str, str]] = {
    "modelopt": {role: role for role in compressed_tensors.OF_MODELOPT},
    "compressed-tensors": compressed_tensors.OF_MODELOPT,
}
KV_MODULE: dict[Layout, dict[str, str]] = {
    "modelopt": {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"},
    "compressed-tensors": {"k_scale": "k_scale", "v_scale": "v_scale"},
}
# One float32 rounding of a product of scales: below this a weight is the same number, rounded once more.
NEGLIGIBLE = 2.0**-22


@dataclass(frozen=True)
class Linear:
    """A quantized linear as it is stored, its tensors by role. kind: of conversion_kinds.py. scalars: of NVFP4, scale_2 and input_scale
    in modelopt's sense, stored: as they stand."""

    module: str
    kind: str
    tensors: dict[str, TensorInfo]
    stored: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rescaled:
    """A fused linear whose members had unequal global scales, and the one they get.

    scales_2: before, by module. relative_errors: ‖new − old‖ / ‖old‖ of each module's weights; all 0 where exact.
    """

    linear: str
    scale_2: float
    exact: bool
    scales_2: dict[str, float]
    relative_errors: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.relative_errors.values())


@dataclass
class Conversion:
    """What is converted. unequal_inputs: fused NVFP4 linears with unequal input scales."""

    subject: Subject
    source: Layout
    to: Layout
    linears: dict[str, Linear]
    rescaled: list[Rescaled] = field(default_factory=list)
    unequal_inputs: list[str] = field(default_factory=list)
    reciprocals: list[float] = field(default_factory=list)  # every number of which one is taken

    @property
    def kinds(self) -> dict[str, str]:
        """Module → kind, in natural order."""
        return {module: linear.kind for module, linear in self.linears.items()}

    @property
    def weight_only(self) -> bool:
        """Whether the activations of all linears stay in 16 bits."""
        return set(self.kinds.values()) == {"nvfp4_w4a16"}

    @property
    def kv_cache_fp8(self) -> bool:
        return self.subject.declared is not None and self.subject.declared.kv_cache == "fp8"


def plan_conversion(subject: Subject, to: Layout, *, without: str | None = None, rescale: bool = False) -> Conversion:
    """Everything that `to` needs, before anything is written; InputError for what cannot be converted.

    without: tensors whose names start so leave the output and are not looked at. rescale: fused linears with unequal global
    scales may lose what E4M3 block scales cannot hold. Reads scalars, and the codes of such linears alone.
    """
    source = layout_of(subject)
    if source == to:
        raise InputError(f"{subject.path}: is {title(subject, to)} already; leave --to out, or name the other layout")
    modules = [module for module in subject.quantized if not (without and f"{module}.".startswith(without))]
    if not modules:
        raise InputError(f"{subject.path}: nothing quantized is outside the vision tower; leave --to out")
    kinds = kinds_of(subject, source, modules)
    linears = {
        module: _nvfp4_linear(subject, module, source, kind) if kind in NVFP4 else _fp8_linear(subject, module, source, kind)
        for module, kind in kinds.items()
    }
    conversion = Conversion(subject, source, to, linears)
    for name, members in _fused(subject, linears):
        if members[0].kind not in NVFP4:
            continue
        if len({member.scalars[nvfp4.SCALE_2] for member in members}) > 1:
            conversion.rescaled.append(_share(subject, name, members))
        if len({member.scalars.get(nvfp4.INPUT_SCALE) for member in members}) > 1:
            conversion.unequal_inputs.append(name)
    lossy = [found for found in conversion.rescaled if found.worst > NEGLIGIBLE]
    if lossy and not rescale:
        worst = max(lossy, key=lambda found: found.worst)
        raise InputError(
            f"{subject.path}: {len(lossy)} fused linears have unequal global scales that block scales cannot make equal exactly "
            f"(worst {worst.linear}: one scale moves its weights by {worst.worst:.2%}, RMS); --rescale accepts that, or quantize again"
        )
    return conversion


def _nvfp4_linear(subject: Subject, module: str, layout: Layout, kind: str) -> Linear:
    """One linear, all its tensors looked at by header and its scalars read."""
    suffixes, found = SUFFIX[layout], subject.modules[module]
    needed = [role for role in suffixes if not (kind == "nvfp4_w4a16" and role == nvfp4.INPUT_SCALE)]
    _refuse_odd(subject, module, f"{layout} NVFP4", allowed=suffixes.values(), needed=[suffixes[role] for role in needed])
    tensors = {role: found[suffix] for role, suffix in suffixes.items() if suffix in found}
    shape = tensors[nvfp4.WEIGHT].shape
    n, k = shape if len(shape) == 2 else (0, 0)
    for role, (dtype, wanted) in nvfp4.output_tensors((n, 2 * k)).items():
        if role in tensors:
            _refuse_unless(subject, tensors[role], (dtype,), (wanted, *([(1,)] if wanted == () else [])))
    stored = {role: _scalar(subject, tensors[role]) for role in compressed_tensors.RECIPROCAL if role in tensors}
    scalars = {role: value if layout == "modelopt" else _reciprocal(value) for role, value in stored.items()}
    return Linear(module, kind, tensors, stored, scalars)


def _fp8_linear(subject: Subject, module: str, layout: Layout, kind: str) -> Linear:
    found = subject.modules[module]
    roles = (fp8.WEIGHT, fp8.SCALE, *([fp8.INPUT_SCALE] if kind == "fp8" else []))
    _refuse_odd(subject, module, f"{layout} FP8 of its kind", allowed=roles, needed=roles)
    tensors = {role: found[role] for role in roles}
    n, k = tensors[fp8.WEIGHT].shape
    halves = FP8_SCALE_DTYPES[layout]
    _refuse_unless(subject, tensors[fp8.WEIGHT], ("F8_E4M3",), ((n, k),))
    shapes = ((), (1,)) if kind == "fp8" else (fp8_scale_shape(kind, layout, n, k),)
    _refuse_unless(subject, tensors[fp8.SCALE], halves, shapes)
    if kind == "fp8":
        _refuse_unless(subject, tensors[fp8.INPUT_SCALE], halves, ((), (1,)))
        for role in (fp8.SCALE, fp8.INPUT_SCALE):
            _scalar(subject, tensors[role])
    return Linear(module, kind, tensors)


def _refuse_odd(subject: Subject, module: str, what: str, *, allowed: Iterable[str], needed: Iterable[str]) -> None:
    found = subject.modules[module]
    if odd := sorted(found.keys() - {*allowed, "bias", *KV_SCALES}):
        raise InputError(f"{subject.path}: {module}.{odd[0]} is no part of {what}, which the other layout has no place for")
    if missing := [suffix for suffix in needed if suffix not in found]:
        raise InputError(f"{subject.path}: {module} has no {missing[0]}; mtpress check names all that is missing")


def _refuse_unless(subject: Subject, info: TensorInfo, dtypes: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> None:
    if info.dtype not in dtypes or info.shape not in shapes:
        raise InputError(f"{subject.path}: {info.name} is {info.dtype} {list(info.shape)}, must be {dtypes[0]} {list(shapes[0])}")


def _scalar(subject: Subject, info: TensorInfo) -> float:
    value = float(read_tensor(info).item())
    if not (value > 0 and math.isfinite(value) and 0 < _reciprocal(value) < math.inf):
        raise InputError(f"{subject.path}: {info.name} is {value:.3g}, a scale must be positive and have a reciprocal in float32")
    return value


def _reciprocal(value: float) -> float:
    return float(compressed_tensors.reciprocal(torch.tensor(value)))


def _fused(subject: Subject, linears: dict[str, Linear]) -> Iterator[tuple[str, list[Linear]]]:
    """The fused linears that are quantized, by the name that the fused one would have; InputError where only a part of one is."""
    for fused, parts in FUSED.items():
        bases = {module.removesuffix(f".{part}"): None for module in linears for part in parts if module.endswith(f".{part}")}
        for base in bases:
            modules = [f"{base}.{part}" for part in parts]
            if lacking := [module for module in modules if module not in linears]:
                raise InputError(
                    f"{subject.path}: {lacking[0]} is not quantized and others of {base}.{fused} are; no engine loads that, quantize again"
                )
            members = [linears[module] for module in modules]
            if other := next((member for member in members if member.kind != members[0].kind), None):
                raise InputError(
                    f"{subject.path}: {other.module} is {KINDS[other.kind]} and {members[0].module} {KINDS[members[0].kind]}; no engine "
                    f"loads two formats in one {fused}, quantize again"
                )
            yield f"{base}.{fused}", members


def _share(subject: Subject, name: str, members: list[Linear]) -> Rescaled:
    """The one global scale that serves the members best."""
    counted = []
    for member in members:
        scales, packed = (read_tensor(member.tensors[role]) for role in (nvfp4.SCALE, nvfp4.WEIGHT))
        try:
            counted.append(Member(member.scalars[nvfp4.SCALE_2], energies(scales, packed)))
        except ValueError as error:
            raise InputError(f"{subject.path}: {member.tensors[nvfp4.SCALE].name}: {error}; fetch the checkpoint again") from None
    shared = best_shared_scale(counted)
    before = {member.module: member.scalars[nvfp4.SCALE_2] for member in members}
    return Rescaled(name, shared.scale_2, shared.exact, before, dict(zip(before, shared.relative_errors, strict=True)))


def apply(conversion: Conversion, revision: Revision) -> None:
    """Puts the changes into the revision. Notes in `conversion.reciprocals` every number whose reciprocal is written."""
    shared = {module: rescaled.scale_2 for rescaled in conversion.rescaled for module in rescaled.scales_2}
    to = SUFFIX[conversion.to]
    for module, linear in conversion.linears.items():
        if linear.kind not in NVFP4:
            _apply_fp8(linear, conversion.to, revision)
            continue
        scalars = dict(linear.scalars)
        if module in shared:
            own, scalars[nvfp4.SCALE_2] = scalars[nvfp4.SCALE_2], shared[module]
            info = linear.tensors[nvfp4.SCALE]
            revision.compute(OutputTensor(info.name, info.dtype, info.shape), partial(_block_scales, info, own, shared[module]))
        weight = linear.tensors[nvfp4.WEIGHT]
        revision.rename(weight.name, f"{module}.{to[nvfp4.WEIGHT]}")
        for role, value in scalars.items():
            if linear.kind == "nvfp4_w4a16" and role == nvfp4.INPUT_SCALE:
                revision.drop(linear.tensors[role].name)  # no engine reads it there
                continue
            if conversion.to == "compressed-tensors":
                conversion.reciprocals.append(value)
                value = _reciprocal(value)
            elif not (module in shared and role == nvfp4.SCALE_2):
                conversion.reciprocals.append(linear.stored[role])
            tensor = OutputTensor(f"{module}.{to[role]}", "F32", SCALAR_SHAPE[conversion.to])
            revision.replace(linear.tensors[role].name, tensor, partial(torch.full, tensor.shape, value, dtype=torch.float32))
    _move_kv_scales(conversion, revision)


def _apply_fp8(linear: Linear, to: Layout, revision: Revision) -> None:
    """The scales in the shape that the layout has for them, and in a dtype that it takes."""
    n, k = linear.tensors[fp8.WEIGHT].shape
    for role in linear.tensors.keys() - {fp8.WEIGHT}:
        info = linear.tensors[role]
        shape = fp8_scale_shape("fp8" if role == fp8.INPUT_SCALE else linear.kind, to, n, k)
        dtype = info.dtype if info.dtype in FP8_SCALE_DTYPES[to] else FP8_SCALE_DTYPES[to][0]
        if (info.dtype, info.shape) != (dtype, shape):
            revision.replace(info.name, OutputTensor(info.name, dtype, shape), partial(_scale_as, info, torch_dtype(dtype), shape))


def _scale_as(info: TensorInfo, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return read_tensor(info).to(dtype).reshape(shape)


def _block_scales(info: TensorInfo, own: float, shared: float) -> torch.Tensor:
    return reexpress(read_tensor(info), own, shared).scales


def _move_kv_scales(conversion: Conversion, revision: Revision) -> None:
    """Scales of the KV cache: modelopt keeps them at k_proj and v_proj, compressed-tensors at the attention; float32 in both."""
    checkpoint: Checkpoint = conversion.subject.checkpoint
    old, new = KV_MODULE[conversion.source], KV_MODULE[conversion.to]
    for name, info in checkpoint.tensors.items():
        for scale in KV_SCALES:
            if name.endswith(f".self_attn.{old[scale]}") and info.num_params == 1:
                tensor = OutputTensor(f"{name.removesuffix(old[scale])}{new[scale]}", "F32", SCALAR_SHAPE[conversion.to])
                revision.replace(name, tensor, partial(_as_float32, info, tensor.shape))


def _as_float32(info: TensorInfo, shape: tuple[int, ...]) -> torch.Tensor:
    return read_tensor(info).float().reshape(shape)
