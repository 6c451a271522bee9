"""Rules on scales: each quantized linear has its own, they are sound numbers, and fused linears share the global ones.

compressed-tensors holds the global scales of NVFP4 as reciprocals. vLLM takes the largest number stored of a fused linear in either
layout: the largest scale of modelopt's, the smallest of compressed-tensors'.
"""

import math
from collections.abc import Iterator

from mtpress.models.qwen3_5.engine import EngineLinear
from mtpress.quant_config import stored
from mtpress.quant_config.stored import (
    FP8_SCALARS,
    GLOBAL_SCALE,
    INPUT_GLOBAL_SCALE,
    INPUT_SCALE,
    QZEROS,
    SCALARS,
    SCALE,
    SCALE_2,
    SCALE_INV,
    SCALE_SUFFIXES,
    SCALES,
    SUFFIXES,
    WEIGHT_SHAPE,
    ZERO_POINT,
    Form,
)
from mtpress.quant_config.view import Subject
from mtpress.rules.rule import QUANTIZE_AGAIN, Problem, Rule
from mtpress.terminal import count

# An amax is 2688 times its scale. No trained weight reaches 2688 or ends below 0.00003, no activation reaches 268,800:
# a scale outside is a reciprocal (or, in compressed-tensors' layout, none), or an amax that was never divided.
PLAUSIBLE = {SCALE_2: (1e-8, 1.0), INPUT_SCALE: (1e-8, 100.0), GLOBAL_SCALE: (1.0, 1e8), INPUT_GLOBAL_SCALE: (0.01, 1e8)}
WITH_FP8: dict[Form, tuple[str, str]] = {**SCALARS, "fp8": FP8_SCALARS}
MADE_ANEW = "mtpress repair CKPT OUT makes anew what follows from the rest, with --base SRC the linear in BF16; else " + QUANTIZE_AGAIN
REEXPRESS = (
    "mtpress repair CKPT OUT writes the block scales under one global scale where that is exact, and says of the others what it would "
    "cost; else " + QUANTIZE_AGAIN
)


def needed(subject: Subject, module: str) -> tuple[str, ...]:
    """The suffixes of the scales that a module must have, by the form it is stored in and what is declared of it."""
    form, scheme = subject.form(module), subject.schemes.get(module)
    if form in SCALARS:
        weight_only = not scheme.activations if scheme is not None else subject.declared is None or subject.declared.weight_only
        return (SCALE, SCALARS[form][0], *(() if weight_only else SCALARS[form][1:]))
    if form == "fp8":
        if scheme is not None and scheme.kind == "fp8" and not subject.other_fp8(module):
            return (scheme.scale_name, *((INPUT_SCALE,) if scheme.static else ()))
        return (SCALE_INV if SCALE_INV in subject.modules[module] else SCALE,)
    if form == "pack-quantized":
        return (SCALE, WEIGHT_SHAPE, *((ZERO_POINT,) if scheme is not None and not scheme.symmetric else ()))
    return (SCALES, QZEROS) if form == "gptq" else ()


def scale_missing(subject: Subject) -> Iterator[Problem]:
    if not subject.covered:
        return
    missing: dict[tuple[Form, str], list[str]] = {}
    for module in subject.quantized:
        if subject.model.component(f"{module}.weight") == "embeddings":
            continue  # weight-dtype says it: no engine reads them
        for suffix in needed(subject, module):
            if suffix not in subject.modules[module]:
                missing.setdefault((subject.form(module), suffix), []).append(f"{module}.{suffix}")
    for (form, suffix), names in missing.items():
        yield Problem(f"{count(len(names), f'{stored.TITLES[form]} linear')} without {suffix}", tuple(names))


def scale_orphan(subject: Subject) -> Iterator[Problem]:
    names = []
    for module, tensors in subject.modules.items():
        form = subject.form(module)
        if form not in ("none", "unknown"):
            unused = _unused(subject, module)
            names += [f"{module}.{suffix}" for suffix in tensors if suffix in SCALE_SUFFIXES and suffix not in SUFFIXES[form]]
            names += [f"{module}.{suffix}" for suffix in tensors if suffix in unused]
    if names:
        yield Problem(f"{count(len(names), 'scale')} of modules that are not stored in that format", tuple(names))


def _unused(subject: Subject, module: str) -> tuple[str, ...]:
    """What compressed-tensors' layout or FP8 may have and this scheme does not: vLLM has no parameter for it."""
    scheme = subject.schemes.get(module)
    if scheme is None:
        return ()
    if subject.form(module) == "nvfp4-pack-quantized" and not scheme.activations:
        return (INPUT_GLOBAL_SCALE,)
    if subject.form(module) == "fp8":
        if scheme.kind != "fp8" or subject.other_fp8(module):
            return ()  # format-differs says it
        return tuple(suffix for suffix in (SCALE, SCALE_INV, INPUT_SCALE) if suffix not in needed(subject, module))
    return (ZERO_POINT,) if subject.form(module) == "pack-quantized" and scheme.symmetric else ()


def scale_unsound(subject: Subject) -> Iterator[Problem]:
    wrong = [name for name, value in subject.scalars.items() if not math.isfinite(value) or value <= 0]
    if wrong:
        shown = ", ".join(str(subject.scalars[name]) for name in wrong[:3])
        yield Problem(f"{count(len(wrong), 'scale')} zero, negative, infinite or NaN ({shown}…)", tuple(wrong))


def scale_implausible(subject: Subject) -> Iterator[Problem]:
    for suffix, (low, high) in PLAUSIBLE.items():
        values = {name: value for name, value in subject.scalars.items() if name.endswith(f".{suffix}") and math.isfinite(value)}
        odd = [name for name, value in values.items() if value > 0 and not low <= value <= high]
        if odd:
            yield Problem(f"{count(len(odd), 'value')} of {suffix} far from any trained one ({values[odd[0]]:.3g}, …)", tuple(odd))


def _fused(subject: Subject) -> Iterator[EngineLinear]:
    return (linear for linear in subject.linears if len(linear.modules) > 1 and linear.part != "draft")


def fused_formats_differ(subject: Subject) -> Iterator[Problem]:
    for linear in _fused(subject):
        forms = {m: subject.form(m) for m in linear.modules if subject.form(m) != "none"}
        if len(set(forms.values())) > 1:
            said = ", ".join(f"{m.rpartition('.')[2]} {stored.TITLES[form]}" for m, form in forms.items())
            yield Problem(f"{linear.prefix} is loaded from shards of different formats: {said}", tuple(forms))


def _differing(subject: Subject, which: int) -> dict[str, float]:
    """Modules of fused linears whose sound scalars differ → by what vLLM multiplies them; which: an index into SCALARS."""
    found: dict[str, float] = {}
    for linear in _fused(subject):
        # of FP8, vLLM rounds the shards anew under one weight scale
        for form, suffixes in (WITH_FP8 if which else SCALARS).items():
            names = {module: f"{module}.{suffixes[which]}" for module in linear.modules if subject.form(module) == form}
            values = {module: subject.scalars[name] for module, name in names.items() if subject.scalars.get(name, 0) > 0}
            values = {module: value for module, value in values.items() if math.isfinite(value)}
            if len(set(values.values())) > 1:
                shared = max(values.values())
                reciprocal = form == "nvfp4-pack-quantized"
                found |= {module: value / shared if reciprocal else shared / value for module, value in values.items()}
    return found


def _furthest(factors: dict[str, float]) -> str:
    return max(factors, key=lambda module: max(factors[module], 1 / factors[module]))


def fused_scales_differ(subject: Subject) -> Iterator[Problem]:
    factors = _differing(subject, 0)
    if factors:
        worst = _furthest(factors)
        message = (
            f"{count(len(factors), 'shard')} of fused linears with unequal global scales; {worst} is multiplied by {factors[worst]:.4g}"
        )
        yield Problem(message, tuple(factors))


def fused_input_scales_differ(subject: Subject) -> Iterator[Problem]:
    factors = _differing(subject, 1)
    if factors:
        worst = _furthest(factors)
        message = (
            f"{count(len(factors), 'shard')} of fused linears with unequal input scales; that of {worst} becomes {factors[worst]:.4g} times"
        )
        yield Problem(message, tuple(factors))


def in_proj_ab_quantized(subject: Subject) -> Iterator[Problem]:
    names = tuple(module for module in subject.quantized if module.endswith(subject.model.AB_LINEARS))
    if names:
        yield Problem(f"{count(len(names), 'module')} in_proj_a and in_proj_b quantized", names)


def input_scales_unused(subject: Subject) -> Iterator[Problem]:
    if subject.declared is not None and subject.declared.format in ("nvfp4", "modelopt-mixed"):
        only = {module for module, scheme in subject.schemes.items() if scheme.kind == "nvfp4" and not scheme.activations}
        names = tuple(name for name in subject.tensors if name.endswith(f".{INPUT_SCALE}") and name.rpartition(".")[0] in only)
        if names:
            yield Problem(f"{count(len(names), INPUT_SCALE)} of linears whose activations stay in 16 bits; vLLM drops them", names)


RULES = (
    Rule(
        "scale-missing",
        "error",
        f"A quantized linear lacks a scale. Of NVFP4, without {SCALE} vLLM stops, without a global one it serves with whatever lay in "
        "memory, and says nothing; the same goes for INT4. Zero points it needs only of asymmetric INT4, transformers needs them always.",
        MADE_ANEW,
        scale_missing,
    ),
    Rule(
        "scale-orphan",
        "error",
        "A scale whose weight is not stored in the format it belongs to, or that this kind of the format does not have: vLLM stops with a "
        "ValueError.",
        "drop it: mtpress repair CKPT OUT",
        scale_orphan,
    ),
    Rule(
        "scale-unsound",
        "error",
        "A float32 scale is zero, negative, infinite or NaN: the linear gives nonsense.",
        MADE_ANEW,
        scale_unsound,
    ),
    Rule(
        "scale-implausible",
        "warning",
        f"A {SCALE_2} above 1 or an {INPUT_SCALE} above 100, or either below 1e-8 (of compressed-tensors, whose {GLOBAL_SCALE} and "
        f"{INPUT_GLOBAL_SCALE} are reciprocals, the inverse): a reciprocal, or an amax not divided by 2688.",
        "mtpress repair CKPT OUT turns reciprocals over; compare with the source: mtpress check CKPT --base SRC",
        scale_implausible,
    ),
    Rule(
        "fused-formats-differ",
        "error",
        "Shards that the engine loads into one linear are stored in different formats.",
        "put all of them in BF16: mtpress repair CKPT OUT --base SRC; else " + QUANTIZE_AGAIN,
        fused_formats_differ,
    ),
    Rule(
        "fused-scales-differ",
        "error",
        f"Shards of one fused linear have different global scales. vLLM takes the largest {SCALE_2}, or the largest {GLOBAL_SCALE}, for "
        "all and does not rescale the blocks: every other shard is multiplied by the quotient.",
        REEXPRESS,
        fused_scales_differ,
    ),
    Rule(
        "fused-input-scales-differ",
        "warning",
        f"Shards of one fused linear have different input scales. vLLM takes the largest {INPUT_SCALE} for all, which costs a little "
        f"accuracy, or the largest {INPUT_GLOBAL_SCALE}, which is the smallest scale and clips activations.",
        "mtpress repair CKPT OUT gives them the largest scale",
        fused_input_scales_differ,
    ),
    Rule(
        "in-proj-ab-quantized",
        "note",
        "in_proj_a and in_proj_b are quantized. They are small and sensitive, and their 48 rows fit no CUTLASS tile in older builds.",
        "quantize again with in_proj_ab: bf16",
        in_proj_ab_quantized,
    ),
    Rule(
        "input-scales-unused",
        "note",
        f"A weight-only modelopt checkpoint carries {INPUT_SCALE}; vLLM drops them with a warning.",
        "nothing needs to be done",
        input_scales_unused,
    ),
)
