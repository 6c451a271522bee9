"""What each quantized linear of a checkpoint is, in words that modelopt's and compressed-tensors' layouts have in common.

In: a checkpoint. Out: its layout, for each linear a kind, which is a key of formats/mixed_precision.py's ALGOS, and how each layout says
a kind. Leaves out: which tensor becomes which (quant_config/conversion.py).

    nvfp4, nvfp4_w4a16   with activations in 4 bits, and in 16
    fp8                  one scale a tensor, one stored scale of the activations
    fp8_by_row           one scale a row, the activations' made by the engine for each token
    fp8_in_blocks        one scale a block of 128×128, the activations' made by the engine for each block of a token

modelopt has an algorithm for each of these and for no other FP8; compressed-tensors can say all of them and more. Source: vLLM 0.32,
layers/quantization/modelopt.py (LINEAR_ALGOS, resolve), compressed_tensors/compressed_tensors.py (_is_fp8_w8a8).
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from mtpress.errors import InputError
from mtpress.formats import compressed_tensors, fp8
from mtpress.formats.mixed_precision import NVFP4
from mtpress.quant_config.declaration import TITLES, Format
from mtpress.quant_config.matching.matcher import Scheme
from mtpress.quant_config.stored import INPUT_GLOBAL_SCALE, INPUT_SCALE, WEIGHT, Form
from mtpress.quant_config.stored import TITLES as FORM_TITLES
from mtpress.quant_config.view import Subject

Layout = Literal["modelopt", "compressed-tensors"]
LAYOUTS: tuple[Layout, ...] = ("modelopt", "compressed-tensors")
NVFP4_FORM: dict[Layout, Form] = {"modelopt": "nvfp4", "compressed-tensors": "nvfp4-pack-quantized"}
DECLARED_AS: dict[Layout, tuple[Format, ...]] = {
    "modelopt": ("nvfp4", "modelopt-mixed", "modelopt-fp8"),
    "compressed-tensors": ("compressed-tensors",),
}
NVFP4_INPUT_SCALE: dict[Layout, str] = {"modelopt": INPUT_SCALE, "compressed-tensors": INPUT_GLOBAL_SCALE}
SCALAR_SHAPE: dict[Layout, tuple[int, ...]] = {"modelopt": (), "compressed-tensors": (1,)}
WHAT = "convert goes between modelopt and compressed-tensors, of NVFP4 and FP8"

KINDS = {
    "nvfp4": "NVFP4", "nvfp4_w4a16": "NVFP4 (W4A16)", "fp8": "FP8", "fp8_by_row": "FP8 by row", "fp8_in_blocks": "FP8 in blocks",
}  # fmt: skip
# compressed-tensors holds scales of FP8 in any float, modelopt in float32, which holds the others' numbers.
FP8_SCALE_DTYPES: dict[Layout, tuple[str, ...]] = {"modelopt": ("F32",), "compressed-tensors": ("F32", "BF16", "F16")}


def title(subject: Subject, layout: Layout) -> str:
    """The layout and what is stored in it: "modelopt FP8 and NVFP4"."""
    forms = {"FP8" if subject.form(module) == "fp8" else "NVFP4" for module in subject.quantized}
    return f"{layout} {' and '.join(sorted(forms))}"


def layout_of(subject: Subject) -> Layout:
    """The layout of a checkpoint's quantized linears; InputError where they have none of the two, or the config contradicts them."""
    path, declared = subject.path, subject.declared
    forms = {subject.form(module) for module in subject.quantized}
    if not forms:
        raise InputError(f"{path}: holds nothing quantized; {WHAT}, mtpress quantize makes NVFP4 of BF16")
    layouts = [layout for layout, form in NVFP4_FORM.items() if forms <= {form, "fp8"}]
    if not layouts:
        said = " and ".join(sorted(FORM_TITLES[form] for form in forms))
        others = [module for module in subject.quantized if subject.form(module) not in (*NVFP4_FORM.values(), "fp8")]
        which = f" ({others[0]} and {len(others) - 1} more are of neither)" if others and len(forms) > 1 else ""
        raise InputError(f"{path}: holds {said}{which}; {WHAT}, without touching a code")
    if len(layouts) > 1:  # FP8 alone, whose names are the same in both
        layouts = [layout for layout in layouts if declared is not None and declared.format in DECLARED_AS[layout]]
        if not layouts:
            said = f"{declared.file} declares {TITLES[declared.format]}" if declared is not None else "no config declares it"
            raise InputError(f"{path}: holds FP8, and {said}; {WHAT}")
    layout = layouts[0]
    if declared is not None and (declared.format not in DECLARED_AS[layout] or not forms <= {*declared.layouts}):
        if declared.format == "compressed-tensors" == layout and (odd := compressed_tensors.departure(declared.content)):
            raise InputError(f"{path}: {declared.file} declares {odd}; {WHAT}")
        said = declared.title if declared.format in DECLARED_AS[layout] else TITLES[declared.format]
        raise InputError(f"{path}: {declared.file} declares {said}, {title(subject, layout)} is stored; try mtpress repair CKPT OUT first")
    if declared is not None and layout == "compressed-tensors" and (odd := compressed_tensors.departure(declared.content)):
        raise InputError(f"{path}: {declared.file} declares {odd}; {WHAT}")
    if declared is not None and declared.kv_cache not in ("auto", "fp8"):
        raise InputError(f"{path}: {declared.file} declares a KV cache in {declared.kv_cache}; convert carries over an FP8 one")
    return layout


def kinds_of(subject: Subject, layout: Layout, modules: Iterable[str]) -> dict[str, str]:
    """Module → kind, in natural order. InputError, which names them, for those of none, and where the config contradicts a shape."""
    kinds: dict[str, str] = {}
    refused: dict[str, list[str]] = {}
    for module in sorted(modules, key=subject.model.natural):
        if subject.form(module) != "fp8":
            kinds[module] = "nvfp4" if _quantizes_activations(subject, layout, module) else "nvfp4_w4a16"
            continue
        scheme = _fp8_scheme(subject, module)
        kind, why = _fp8_kind(scheme, subject.modules[module][WEIGHT].shape)
        kinds[module] = kind
        if why:
            refused.setdefault(why, []).append(module)
    for why, of_them in refused.items():
        others = f" and {len(of_them) - 1} more are" if len(of_them) > 1 else " is"
        raise InputError(f"{subject.path}: {of_them[0]}{others} FP8 {why}, for which modelopt has no algorithm; keep compressed-tensors")
    return kinds


def _quantizes_activations(subject: Subject, layout: Layout, module: str) -> bool:
    """Whether the activations of an NVFP4 linear are in 4 bits: by what is declared of it or, where all else agrees, of the others."""
    said = subject.schemes.get(module)
    if said is not None and said.kind == "nvfp4":
        return said.activations
    suffix = NVFP4_INPUT_SCALE[layout]
    if subject.declared is None:
        return any(suffix in subject.modules[other] for other in subject.quantized if subject.form(other) != "fp8")
    others = {scheme.activations for scheme in subject.schemes.values() if scheme.kind == "nvfp4"}
    return others.pop() if len(others) == 1 else suffix in subject.modules[module]


def _fp8_scheme(subject: Subject, module: str) -> Scheme:
    said, stored = subject.schemes.get(module), subject.fp8_schemes.get(module)
    if stored is None:
        raise InputError(
            f"{subject.path}: {module} is FP8 without a scale of a tensor, row or block; mtpress check names all that is missing"
        )
    if said is None:
        return stored
    if said.kind != "fp8" or subject.other_fp8(module):
        raise InputError(f"{subject.path}: {module} is declared in another format than it is stored in; try mtpress repair CKPT OUT first")
    return said


def _fp8_kind(scheme: Scheme, shape: tuple[int, ...]) -> tuple[str, str]:
    """The kind of an FP8 scheme, and why modelopt cannot hold it; empty where it can."""
    if not scheme.activations:
        return "fp8", "with activations in 16 bits"
    if scheme.scale_of == "tensor":
        return "fp8", "" if scheme.static else "with one scale a tensor and none stored for activations"
    if scheme.scale_of == "channel":
        return "fp8_by_row", "with one scale a row and a stored one for activations" if scheme.static else ""
    if scheme.block != fp8.BLOCK:
        return "fp8_in_blocks", f"in blocks of {scheme.block[0]}×{scheme.block[1]}, not 128×128"
    return "fp8_in_blocks", f"in blocks that do not divide its {shape[1]} columns" if shape[1] % fp8.BLOCK[1] else ""


def fp8_scale_shape(kind: str, layout: Layout, n: int, k: int) -> tuple[int, ...]:
    """The shape in which a layout holds the scales of an FP8 matrix [N, K]."""
    if kind == "fp8":
        return SCALAR_SHAPE[layout]
    if kind == "fp8_by_row":
        return (n,) if layout == "modelopt" else (n, 1)
    rows, columns = -(-n // fp8.BLOCK[0]), -(-k // fp8.BLOCK[1])
    return (rows, 1, columns, 1) if layout == "modelopt" else (rows, columns)


def compressed_tensors_groups(kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """The config groups of compressed-tensors for linears of these kinds: class names where all are of one, else full names."""
    members: dict[str, list[str]] = {}
    for module, kind in kinds.items():
        members.setdefault(kind, []).append(module)
    groups = []
    for kind, modules in members.items():
        named = [module for module in modules if module != "lm_head"] if len(members) > 1 else ["Linear"]
        targets = [*named, *([compressed_tensors.LM_HEAD_TARGET] if "lm_head" in modules else [])]
        groups.append(_group(kind, targets))
    return groups


def _group(kind: str, targets: list[str]) -> dict[str, Any]:
    if kind in NVFP4:
        return compressed_tensors.nvfp4_group(targets, weight_only=kind == "nvfp4_w4a16")
    strategy = {"fp8": "tensor", "fp8_by_row": "channel", "fp8_in_blocks": "block"}[kind]
    block = fp8.BLOCK if kind == "fp8_in_blocks" else None
    return compressed_tensors.fp8_group(targets, strategy, static=kind == "fp8", block=block)
