"""Repairs of NVFP4 scales: those that a shard can take from the shards it is fused with, reciprocals, orphans, unshared ones.

In: float32 scalars and, where fused shards have different global scales, the block scales and codes of those shards. Out: other
scales; the 4-bit codes are never touched. Leaves out: the search for a shared global scale (formats/nvfp4_rescale.py).
"""

import math
import struct
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from mtpress.checkpoint import TensorInfo, read_tensor
from mtpress.models.qwen3_5_engine import EngineLinear
from mtpress.repairs.base_files import base_tensor, bring_back, group_of
from mtpress.repairs.declaration import declare
from mtpress.repairs.repair import AGAIN, OTHER_BASE, Context, Fix, Left, Repair, Turn
from mtpress.rules.rule import Finding, count
from mtpress.rules.scales import PLAUSIBLE
from mtpress.rules.stored import INPUT_SCALE, KV_SCALES, SCALE, SCALE_2, WEIGHT
from mtpress.rules.subject import Subject

if TYPE_CHECKING:
    import torch

AMAX_OF_SCALE = 2688  # 6 · 448
LARGEST_AMAX = 100.0  # of a trained weight; above it a weight_scale_2 is no amax that was never divided, so it is a reciprocal


def float32(value: float) -> float:
    """The nearest float32 number."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def set_scalar(ctx: Context, name: str, value: float) -> None:
    """A float32 scale, in the shape it has."""
    known = ctx.subject.tensors.get(name)
    ctx.overlay.put_scalar(name, struct.pack("<f", value), known.shape if known is not None and known.num_params == 1 else ())


def sibling_scale(subject: Subject, name: str) -> float | None:
    """The one sound value that the other shards of a fused linear have of a scale; None where they have none, or several."""
    module, _, suffix = name.rpartition(".")
    names = [f"{m}.{suffix}" for m in group_of(subject, module) if m != module]
    values = {subject.scalars[n] for n in names if n in subject.scalars}
    value = values.pop() if len(values) == 1 else None
    low, high = PLAUSIBLE.get(suffix, (0.0, math.inf))
    return value if value is not None and low <= value <= high else None


def scale_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    suffix = finding.where[0].rpartition(".")[2]
    if suffix == INPUT_SCALE and not any(name.endswith(f".{INPUT_SCALE}") for name in ctx.subject.tensors):
        yield from declare(ctx)  # which then says that activations stay in 16 bits
        return
    yield from _new_scales(ctx, finding.where, "is missing")


def scale_unsound(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from _new_scales(ctx, finding.where, "is no sound number")


def _new_scales(ctx: Context, names: tuple[str, ...], what: str) -> Iterator[Fix | Left]:
    """input_scale from the shards of its fused linear, as the engine takes the largest of theirs; else the module in BF16 from the base."""
    shared, others = list[str](), list[str]()
    for name in names:
        value = sibling_scale(ctx.subject, name) if name.endswith(f".{INPUT_SCALE}") else None
        if value is None:
            others.append(name)
        else:
            set_scalar(ctx, name, value)
            shared.append(name)
    if shared:
        yield Fix(f"{count(len(shared), INPUT_SCALE)} taken from the shards it is fused with, as the engine does")
    kv = [name for name in others if name.rpartition(".")[2] in KV_SCALES]
    modules = [name.rpartition(".")[0] for name in others if name not in kv]
    done, missing = bring_back(ctx, modules) if ctx.base is not None else ([], modules)
    if done:
        yield Fix(f"{count(len(done), 'module')} put from the base in BF16, bit for bit")
    if missing or kv:
        takes = AGAIN if kv or ctx.base is not None else f"--base SRC, which puts the module in BF16 in its place; or {AGAIN}"
        yield Left(
            f"the {(*missing, *kv)[0].rpartition('.')[2] if kv else 'scale'} of {(*missing, *kv)[0]} {what}, and nothing stored has it",
            takes,
        )


def scale_orphan(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    for name in finding.where:
        ctx.overlay.drop(name)
    yield Fix(f"{count(len(finding.where), 'scale')} dropped, of modules that are not stored in that format")


def scale_implausible(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Reciprocals are turned back: a weight_scale_2 that is too large to be an amax, and the input_scale where all of them are."""
    subject = ctx.subject
    turned, others = 0, list[str]()
    own = {name: value for name, value in subject.scalars.items() if name.endswith(f".{SCALE_2}")}
    all_reciprocal = bool(own) and all(value > LARGEST_AMAX for value in own.values())
    for name in finding.where:
        value = subject.scalars[name]
        if name.endswith(f".{SCALE_2}") and value > LARGEST_AMAX and _within(SCALE_2, 1 / value):
            inputs = [n for n in subject.scalars if n.endswith(f".{INPUT_SCALE}")] if all_reciprocal else []
            for one in (name, *(n for n in inputs if n.rpartition(".")[0] == name.rpartition(".")[0])):
                set_scalar(ctx, one, turned_back(subject.scalars[one], sibling_scale(subject, one)))
            turned += 1
        elif not (all_reciprocal and name.endswith(f".{INPUT_SCALE}")):
            others.append(name)
    if turned:
        yield Fix(f"{count(turned, SCALE_2)} turned back from the reciprocal")
    if others:
        yield Left(
            f"it cannot be said what {others[0]} = {subject.scalars[others[0]]:.3g} should be",
            "compare it with the source: mtpress check CKPT --base SRC",
        )


def _within(suffix: str, value: float) -> bool:
    low, high = PLAUSIBLE[suffix]
    return low <= value <= high


def turned_back(reciprocal: float, sibling: float | None = None) -> float:
    """The float32 x whose float32 reciprocal is given: the siblings' x if it is one, else that of a BF16 amax / 2688, else the nearest.

    Several float32 numbers may have one reciprocal; an amax has 8 significant bits, so at most one of them is the right one.
    """
    if sibling is not None and float32(1 / sibling) == reciprocal:
        return sibling
    nearest = float32(1 / reciprocal)
    bits = struct.unpack("<i", struct.pack("<f", nearest))[0]
    around = [struct.unpack("<f", struct.pack("<i", bits + step))[0] for step in (0, -1, 1, -2, 2)]
    for candidate in around:
        raw = struct.unpack("<I", struct.pack("<f", candidate * AMAX_OF_SCALE))[0]
        amax = struct.unpack("<f", struct.pack("<I", (raw + 0x8000) & 0xFFFF0000))[0]
        if float32(amax / AMAX_OF_SCALE) == candidate and float32(1 / candidate) == reciprocal:
            return float(candidate)
    return nearest


def fused_formats_differ(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """All shards in BF16 from the base: one in BF16 cannot be quantized without loss."""
    modules = [module for module in finding.where if ctx.subject.form(module) != "plain"]
    if ctx.base is None:
        yield Left("shards of one linear are stored in different formats", f"--base SRC, which puts all of them in BF16; or {AGAIN}")
        return
    done, missing = bring_back(ctx, modules)
    if done:
        yield Fix(f"{count(len(done), 'module')} put from the base in BF16, bit for bit, as the shard that is not quantized")
    if missing:
        yield Left(f"the base has no {missing[0]}.{WEIGHT} of that shape", OTHER_BASE)


def fused_input_scales_differ(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    subject = ctx.subject
    done = 0
    for linear in fused(subject):
        names = [f"{module}.{INPUT_SCALE}" for module in linear.modules]
        values = {name: subject.scalars[name] for name in names if name in subject.scalars}
        if set(linear.modules) & set(finding.where) and len(values) == len(names) and all(map(math.isfinite, values.values())):
            for name in [name for name, value in values.items() if value != max(values.values())]:
                set_scalar(ctx, name, max(values.values()))
                done += 1
    if done:
        yield Fix(f"{count(done, INPUT_SCALE)} set to the largest of its fused linear, which is what the engine takes")
    else:
        yield Left("some of the scales are no sound numbers", AGAIN)


def fused(subject: Subject) -> Iterator[EngineLinear]:
    """The linears that the engine fuses from several modules."""
    return (linear for linear in subject.linears if len(linear.modules) > 1 and linear.part != "draft")


def fused_scales_differ(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The block scales written anew under one global scale, where every weight keeps its value; the codes stay in any case."""
    subject = ctx.subject
    done, costs = list[str](), dict[str, float]()
    told = 0
    for linear in fused(subject):
        if not set(linear.modules) & set(finding.where):
            continue
        parts = {m: [subject.tensors.get(f"{m}.{suffix}") for suffix in (WEIGHT, SCALE)] for m in linear.modules}
        usable = all(subject.form(m) == "nvfp4" and f"{m}.{SCALE_2}" in subject.scalars for m in linear.modules)
        if not usable or any(info is None or ctx.overlay.is_computed(info.name) for infos in parts.values() for info in infos):
            costs[linear.prefix] = math.nan
        elif not ctx.may_read:
            done.append(linear.prefix)
        else:
            told += wrong_label(ctx, linear)
            cost = share(ctx, linear.modules)
            if cost is None:
                done.append(linear.prefix)
            else:
                costs[linear.prefix] = cost
    if done:
        label = f"; in {told} the scale itself was wrong, by the base" if told else ""
        sure = "" if ctx.may_read else ", if E4M3 allows it"
        how = f"given one {SCALE_2}: block scales written anew, codes untouched, every weight keeps its value"
        yield Fix(f"{count(len(done), 'fused linear')} {how}{sure}{label}")
    if costs:
        worst = max(costs, key=lambda prefix: costs[prefix])
        yield Left(
            f"{count(len(costs), 'fused linear')} cannot share a {SCALE_2} exactly; to round the block scales would change {worst} by "
            f"{costs[worst]:.3g} (‖ŵ′ − ŵ‖/‖ŵ‖)",
            AGAIN,
        )


def wrong_label(ctx: Context, linear: EngineLinear) -> bool:
    """With a base: gives every shard the largest global scale where that brings the weights nearer to the source than its own does."""
    from mtpress.comparison import relative_error

    subject = ctx.subject
    values = {module: subject.scalars[f"{module}.{SCALE_2}"] for module in linear.modules}
    largest = max(values, key=lambda module: values[module])
    changed = False
    for module, value in values.items():
        origin = base_tensor(ctx, f"{module}.{WEIGHT}", subject.called_for.get(f"{module}.{WEIGHT}"))
        if value == values[largest] or origin is None:
            continue
        packed, blocks = (subject.tensors[f"{module}.{suffix}"] for suffix in (WEIGHT, SCALE))
        own, theirs = (relative_error(packed, blocks, subject.tensors[f"{m}.{SCALE_2}"], origin)[0] for m in (module, largest))
        if theirs < own:
            set_scalar(ctx, f"{module}.{SCALE_2}", values[largest])
            changed = True
    return changed


def share(ctx: Context, modules: tuple[str, ...]) -> float | None:
    """Gives modules one global scale if no weight changes by it: None, and else what the best one would cost.

    Reads the block scales and, as blocks of zeros take any scale, the codes.
    """
    from mtpress.formats.nvfp4_rescale import Member, best_shared_scale, energies

    subject = ctx.subject
    own = {module: subject.scalars[f"{module}.{SCALE_2}"] for module in modules}
    if len(set(own.values())) == 1:
        return None
    try:
        members = [
            Member(own[m], energies(*(read_tensor(subject.tensors[f"{m}.{suffix}"]) for suffix in (SCALE, WEIGHT)))) for m in modules
        ]
    except ValueError:
        return math.nan
    shared = best_shared_scale(members)
    if not shared.exact:
        return max(shared.relative_errors)
    for module in modules:
        if own[module] != shared.scale_2:
            info = subject.tensors[f"{module}.{SCALE}"]
            ctx.overlay.compute(info.name, info.dtype, info.shape, partial(_rewritten, info, own[module], shared.scale_2))
            set_scalar(ctx, f"{module}.{SCALE_2}", shared.scale_2)
    return None


def _rewritten(blocks: TensorInfo, own: float, shared: float) -> "torch.Tensor":
    from mtpress.formats.nvfp4_rescale import reexpress

    return reexpress(read_tensor(blocks), own, shared).scales


def input_scales_unused(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    for name in finding.where:
        ctx.overlay.drop(name)
    yield Fix(f"{count(len(finding.where), INPUT_SCALE)} dropped, as vLLM does")


REPAIRS = (
    Repair("scale-missing", "input_scale from the shards of its fused linear; where no module has one, activations are declared to stay in "
           "16 bits; any other: the module in BF16 from the base (`--base`)", scale_missing),
    Repair("scale-orphan", "dropped", scale_orphan, Turn.DROPS),
    Repair("scale-unsound", "input_scale from the shards of its fused linear; any other: the module in BF16 from the base (`--base`)",
           scale_unsound),
    Repair("scale-implausible", "a reciprocal weight_scale_2 is turned back, and input_scale where all are reciprocals; else left",
           scale_implausible, Turn.CONFIG),
    Repair("fused-formats-differ", "all shards in BF16 from the base (`--base`)", fused_formats_differ),
    Repair("fused-scales-differ", "one global scale, block scales anew, codes untouched, where every weight keeps its value exactly; "
           "else left, with the error it would cost. `--base` tells a global scale that is wrong from one that is not shared",
           fused_scales_differ),
    Repair("fused-input-scales-differ", "set to the largest of the linear, as the engine does", fused_input_scales_differ),
    Repair("in-proj-ab-quantized", "nothing is wrong, it is a choice of the build"),
    Repair("input-scales-unused", "dropped, as vLLM does", input_scales_unused),
)  # fmt: skip
