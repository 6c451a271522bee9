"""Rules on NVFP4 scales: each linear has its own, they are sound numbers, and fused linears share them."""

import math
from collections.abc import Iterator

from mtpress.models.qwen3_5_engine import EngineLinear
from mtpress.rules import stored
from mtpress.rules.rule import Problem, Rule, count
from mtpress.rules.stored import INPUT_SCALE, NVFP4_SCALES, SCALE, SCALE_2, SCALE_SUFFIXES, SUFFIXES
from mtpress.rules.subject import Subject

# An amax is 2688 times its scale. No trained weight reaches 2688 or ends below 0.00003, no activation reaches 268,800:
# a scale outside is a reciprocal (compressed-tensors' convention) or an amax that was never divided.
PLAUSIBLE = {SCALE_2: (1e-8, 1.0), INPUT_SCALE: (1e-8, 100.0)}
QUANTIZE_AGAIN = "quantize again: mtpress quantize SRC OUT --recipe NAME"


def scale_missing(subject: Subject) -> Iterator[Problem]:
    if not subject.covered:
        return
    weight_only = subject.declared is None or subject.declared.weight_only
    needed = [suffix for suffix in NVFP4_SCALES if not (weight_only and suffix == INPUT_SCALE)]
    for suffix in needed:
        modules = [m for m, form in subject.forms.items() if form == "nvfp4" and suffix not in subject.modules[m]]
        if modules:
            yield Problem(f"{count(len(modules), 'NVFP4 linear')} without {suffix}", tuple(f"{m}.{suffix}" for m in modules))


def scale_orphan(subject: Subject) -> Iterator[Problem]:
    names = []
    for module, tensors in subject.modules.items():
        form = subject.form(module)
        if form not in ("none", "unknown"):
            names += [f"{module}.{suffix}" for suffix in tensors if suffix in SCALE_SUFFIXES and suffix not in SUFFIXES[form]]
    if names:
        yield Problem(f"{count(len(names), 'scale')} of modules that are not stored in that format", tuple(names))


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


def _differing(subject: Subject, suffix: str) -> dict[str, float]:
    """Modules of fused linears whose sound scalars differ → how many times too large the shared one is for it."""
    found: dict[str, float] = {}
    for linear in _fused(subject):
        names = {module: f"{module}.{suffix}" for module in linear.modules}
        values = {module: subject.scalars[name] for module, name in names.items() if subject.scalars.get(name, 0) > 0}
        values = {module: value for module, value in values.items() if math.isfinite(value)}
        if len(set(values.values())) > 1:
            shared = max(values.values())
            found |= {module: shared / value for module, value in values.items()}
    return found


def fused_scales_differ(subject: Subject) -> Iterator[Problem]:
    factors = _differing(subject, SCALE_2)
    if factors:
        worst = max(factors, key=lambda module: factors[module])
        message = f"{count(len(factors), 'shard')} of fused linears with unequal {SCALE_2}; {worst} is multiplied by {factors[worst]:.4g}"
        yield Problem(message, tuple(factors))


def fused_input_scales_differ(subject: Subject) -> Iterator[Problem]:
    factors = _differing(subject, INPUT_SCALE)
    if factors:
        message = f"{count(len(factors), 'shard')} of fused linears with unequal {INPUT_SCALE}, up to {max(factors.values()):.4g} times"
        yield Problem(message, tuple(factors))


def in_proj_ab_quantized(subject: Subject) -> Iterator[Problem]:
    names = tuple(module for module in subject.quantized if module.endswith(subject.model.AB_LINEARS))
    if names:
        yield Problem(f"{count(len(names), 'module')} in_proj_a and in_proj_b quantized", names)


def input_scales_unused(subject: Subject) -> Iterator[Problem]:
    if subject.declared is not None and subject.covered and subject.declared.weight_only:
        names = tuple(name for name in subject.tensors if name.endswith(f".{INPUT_SCALE}"))
        if names:
            yield Problem(f"{count(len(names), INPUT_SCALE)} in a checkpoint whose activations stay in 16 bits; vLLM drops them", names)


RULES = (
    Rule(
        "scale-missing",
        "error",
        f"An NVFP4 linear lacks a scale. Without {SCALE} vLLM stops; without {SCALE_2} or {INPUT_SCALE} it serves with whatever lay in "
        "memory, and says nothing.",
        QUANTIZE_AGAIN,
        scale_missing,
    ),
    Rule(
        "scale-orphan",
        "error",
        "A scale whose weight is not stored in the format it belongs to: vLLM stops with a ValueError.",
        "drop it: mtpress repair CKPT OUT",
        scale_orphan,
    ),
    Rule(
        "scale-unsound",
        "error",
        "A float32 scale is zero, negative, infinite or NaN: the linear gives nonsense.",
        QUANTIZE_AGAIN,
        scale_unsound,
    ),
    Rule(
        "scale-implausible",
        "warning",
        f"A {SCALE_2} above 1 or an {INPUT_SCALE} above 100, or either below 1e-8: a reciprocal, or an amax not divided by 2688.",
        "compare with the source: mtpress check CKPT --base SRC",
        scale_implausible,
    ),
    Rule(
        "fused-formats-differ",
        "error",
        "Shards that the engine loads into one linear are stored in different formats.",
        QUANTIZE_AGAIN,
        fused_formats_differ,
    ),
    Rule(
        "fused-scales-differ",
        "error",
        f"Shards of one fused linear have different {SCALE_2}. vLLM takes the largest for all and does not rescale the blocks: every "
        "other shard is multiplied by largest/own.",
        QUANTIZE_AGAIN,
        fused_scales_differ,
    ),
    Rule(
        "fused-input-scales-differ",
        "warning",
        f"Shards of one fused linear have different {INPUT_SCALE}. vLLM takes the largest for all, which costs a little accuracy.",
        QUANTIZE_AGAIN,
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
        f"A weight-only checkpoint carries {INPUT_SCALE}; vLLM drops them with a warning.",
        "nothing needs to be done",
        input_scales_unused,
    ),
)
