"""Which tensor of an NVFP4 checkpoint becomes which in the other layout, modelopt's or compressed-tensors'.

In: a checkpoint and the layout it is to have. Out: a `Conversion`: its NVFP4 linears, and of fused linears with unequal global
scales what one scale costs; then the changes, put into a Revision. Leaves out: the config files and the order of work
(stages/convert.py), the arithmetic (formats/compressed_tensors.py, formats/nvfp4_rescale.py).

Codes and block scales go over byte for byte; only fused linears whose members do not share one global scale get new block scales,
because an engine would take one global scale for all of them and multiply the others' weights by the ratio.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from mtpress.checkpoint import Checkpoint, TensorInfo, read_tensor
from mtpress.errors import InputError
from mtpress.formats import compressed_tensors, nvfp4
from mtpress.formats.nvfp4_rescale import Member, best_shared_scale, energies, reexpress
from mtpress.models.qwen3_5 import FUSED
from mtpress.revision import Revision
from mtpress.rules.declaration import TITLES, Format
from mtpress.rules.stored import KV_SCALES, Form
from mtpress.rules.stored import TITLES as FORM_TITLES
from mtpress.rules.subject import Subject
from mtpress.shard_writer import OutputTensor

Layout = Literal["modelopt", "compressed-tensors"]
LAYOUTS: tuple[Layout, ...] = ("modelopt", "compressed-tensors")
FORM_OF: dict[Layout, Form] = {"modelopt": "nvfp4", "compressed-tensors": "nvfp4-pack-quantized"}
DECLARED_AS: dict[Layout, Format] = {"modelopt": "nvfp4", "compressed-tensors": "compressed-tensors"}
TITLE_OF: dict[Layout, str] = {"modelopt": "modelopt NVFP4", "compressed-tensors": "compressed-tensors NVFP4"}
WHAT = "convert goes between modelopt NVFP4 and compressed-tensors NVFP4"

# Role → suffix in each layout. A role has the name that modelopt's suffix has.
SUFFIX: dict[Layout, dict[str, str]] = {
    "modelopt": {role: role for role in compressed_tensors.OF_MODELOPT},
    "compressed-tensors": compressed_tensors.OF_MODELOPT,
}
SCALAR_SHAPE: dict[Layout, tuple[int, ...]] = {"modelopt": (), "compressed-tensors": (1,)}
KV_MODULE: dict[Layout, dict[str, str]] = {
    "modelopt": {"k_scale": "k_proj.k_scale", "v_scale": "v_proj.v_scale"},
    "compressed-tensors": {"k_scale": "k_scale", "v_scale": "v_scale"},
}
# One float32 rounding of a product of scales: below this a weight is the same number, rounded once more.
NEGLIGIBLE = 2.0**-22


@dataclass(frozen=True)
class Linear:
    """An NVFP4 linear as it is stored. scalars: scale_2 and input_scale in modelopt's sense, stored: as they stand."""

    module: str
    tensors: dict[str, TensorInfo]
    stored: dict[str, float]
    scalars: dict[str, float]


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
    """What is converted. weight_only: activations stay in 16 bits. unequal_inputs: fused linears with unequal input scales."""

    subject: Subject
    source: Layout
    to: Layout
    weight_only: bool
    linears: dict[str, Linear]
    rescaled: list[Rescaled] = field(default_factory=list)
    unequal_inputs: list[str] = field(default_factory=list)
    reciprocals: list[float] = field(default_factory=list)  # every number of which one is taken

    @property
    def kv_cache_fp8(self) -> bool:
        return self.subject.declared is not None and self.subject.declared.kv_cache == "fp8"


def layout_of(subject: Subject) -> Layout:
    """The layout of a checkpoint's quantized linears; InputError where they have none of the two, or the config contradicts them."""
    path, declared = subject.path, subject.declared
    forms = {subject.form(module) for module in subject.quantized}
    if not forms:
        raise InputError(f"{path}: holds nothing quantized; {WHAT}, mtpress quantize makes NVFP4 of BF16")
    layouts = [layout for layout, form in FORM_OF.items() if form in forms]
    if len(forms) > 1 or not layouts:
        said = " and ".join(sorted(FORM_TITLES[form] for form in forms))
        others = [module for module in subject.quantized if subject.form(module) not in FORM_OF.values()]
        which = f" ({others[0]} and {len(others) - 1} more are no NVFP4)" if others and len(forms) > 1 else ""
        raise InputError(f"{path}: holds {said}{which}; {WHAT}, without touching a 4-bit code")
    layout = layouts[0]
    if declared is not None and declared.format != DECLARED_AS[layout]:
        raise InputError(
            f"{path}: {declared.file} declares {TITLES[declared.format]}, {TITLE_OF[layout]} is stored; try mtpress repair CKPT OUT first"
        )
    if declared is not None and layout == "compressed-tensors" and (odd := compressed_tensors.departure(declared.content)):
        raise InputError(f"{path}: {declared.file} declares {odd}; {WHAT}")
    if declared is not None and declared.kv_cache not in ("auto", "fp8"):
        raise InputError(f"{path}: {declared.file} declares a KV cache in {declared.kv_cache}; convert carries over an FP8 one")
    return layout


def plan_conversion(subject: Subject, to: Layout, *, without: str | None = None, rescale: bool = False) -> Conversion:
    """Everything that `to` needs, before anything is written; InputError for what cannot be converted.

    without: tensors whose names start so leave the output and are not looked at. rescale: fused linears with unequal global
    scales may lose what E4M3 block scales cannot hold. Reads scalars, and the codes of such linears alone.
    """
    source = layout_of(subject)
    if source == to:
        raise InputError(f"{subject.path}: is {TITLE_OF[to]} already; leave --to out, or name the other layout")
    weight_only = is_weight_only(subject, source)
    modules = [module for module in subject.quantized if not (without and f"{module}.".startswith(without))]
    if not modules:
        raise InputError(f"{subject.path}: nothing quantized is outside the vision tower; leave --to out")
    linears = {module: _linear(subject, module, source, weight_only) for module in modules}
    conversion = Conversion(subject, source, to, weight_only, linears)
    for name, members in _fused(subject, linears):
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


def is_weight_only(subject: Subject, layout: Layout) -> bool:
    """Whether activations stay in 16 bits: by the declaration, without one by whether any input scale is stored."""
    declared = subject.declared
    if declared is None:
        suffix = SUFFIX[layout][nvfp4.INPUT_SCALE]
        return not any(suffix in subject.modules[module] for module in subject.quantized)
    if layout == "compressed-tensors":
        return all(group.get("input_activations") is None for group in declared.groups)
    return declared.weight_only


def _linear(subject: Subject, module: str, layout: Layout, weight_only: bool) -> Linear:
    """One linear, all its tensors looked at by header and its scalars read."""
    suffixes, found = SUFFIX[layout], subject.modules[module]
    allowed = {*suffixes.values(), "bias", *KV_SCALES}
    if odd := sorted(found.keys() - allowed):
        raise InputError(f"{subject.path}: {module}.{odd[0]} is no part of {TITLE_OF[layout]}, which the other layout has no place for")
    needed = [role for role in suffixes if not (weight_only and role == nvfp4.INPUT_SCALE)]
    if missing := [suffixes[role] for role in needed if suffixes[role] not in found]:
        raise InputError(f"{subject.path}: {module} has no {missing[0]}; mtpress check names all that is missing")
    tensors = {role: found[suffix] for role, suffix in suffixes.items() if suffix in found}
    shape = tensors[nvfp4.WEIGHT].shape
    n, k = shape if len(shape) == 2 else (0, 0)
    for role, (dtype, wanted) in nvfp4.output_tensors((n, 2 * k)).items():
        info = tensors.get(role)
        if info is not None and (info.dtype != dtype or (info.shape != wanted and not (wanted == () and info.shape == (1,)))):
            raise InputError(f"{subject.path}: {info.name} is {info.dtype} {list(info.shape)}, must be {dtype} {list(wanted)}")
    stored = {role: read_tensor(tensors[role]).item() for role in compressed_tensors.RECIPROCAL if role in tensors}
    scalars = {role: _in_modelopt(value, layout) for role, value in stored.items()}
    for role, value in stored.items():
        if not (value > 0 and math.isfinite(value) and 0 < _reciprocal(value) < math.inf):
            raise InputError(
                f"{subject.path}: {tensors[role].name} is {value:.3g}, a scale must be positive and have a reciprocal in float32"
            )
    return Linear(module, tensors, stored, scalars)


def _reciprocal(value: float) -> float:
    return float(compressed_tensors.reciprocal(torch.tensor(value)))


def _in_modelopt(value: float, layout: Layout) -> float:
    return value if layout == "modelopt" or value == 0 else _reciprocal(value)


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
            yield f"{base}.{fused}", [linears[module] for module in modules]


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
        scalars = dict(linear.scalars)
        if module in shared:
            own, scalars[nvfp4.SCALE_2] = scalars[nvfp4.SCALE_2], shared[module]
            info = linear.tensors[nvfp4.SCALE]
            revision.compute(OutputTensor(info.name, info.dtype, info.shape), partial(_block_scales, info, own, shared[module]))
        weight = linear.tensors[nvfp4.WEIGHT]
        revision.rename(weight.name, f"{module}.{to[nvfp4.WEIGHT]}")
        for role, value in scalars.items():
            if conversion.weight_only and role == nvfp4.INPUT_SCALE:
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
