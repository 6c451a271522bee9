"""Repairs of scales: those that a shard can take from the shards it is fused with, reciprocals, orphans, unshared ones.

In: float32 scalars and, where fused shards have different global scales, the block scales and codes of those shards. Out: other
scales; the 4-bit codes are never touched. Leaves out: the search for a shared global scale (formats/nvfp4_rescale.py).
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mtpress.checkpoint.safetensors import TensorInfo, read_tensor
from mtpress.models.qwen3_5.engine import EngineLinear
from mtpress.quant_config.declaration import Declaration
from mtpress.quant_config.stored import INPUT_SCALE, KV_SCALES, QZEROS, SCALARS, SCALE, SCALE_2, SCALES, WEIGHT, WEIGHT_PACKED, WEIGHT_SHAPE
from mtpress.quant_config.view import Subject
from mtpress.repairs.bf16 import InBF16, group_of, in_bf16
from mtpress.repairs.declaration import declare
from mtpress.repairs.from_source import LARGEST_SHARE, base_tensor
from mtpress.repairs.repair import OTHER_BASE, Context, Fix, Left, Repair, Turn
from mtpress.rules.rule import QUANTIZE_AGAIN, Finding
from mtpress.rules.scales import PLAUSIBLE
from mtpress.terminal import count

if TYPE_CHECKING:
    import torch

INPUT_SCALES = tuple(suffixes[1] for suffixes in SCALARS.values())
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
    if suffix in INPUT_SCALES and not any(name.endswith(f".{suffix}") for name in ctx.subject.tensors):
        yield from declare(ctx)  # which then says that activations stay in 16 bits
        return
    if suffix in (WEIGHT_SHAPE, QZEROS):
        yield from _made_anew(ctx, finding.where, suffix)
    else:
        yield from _new_scales(ctx, finding.where, "is missing")


def _made_anew(ctx: Context, names: tuple[str, ...], suffix: str) -> Iterator[Fix | Left]:
    """What follows from the rest: the shape that compressed-tensors stores beside INT4 codes, and symmetric zero points."""
    subject = ctx.subject
    declared = subject.declared
    others = list[str]()
    for name in names:
        module = name.rpartition(".")[0]
        shape, scheme = subject.called_for.get(f"{module}.{WEIGHT}"), subject.schemes.get(module)
        scales = subject.modules[module].get(SCALES)
        if suffix == WEIGHT_SHAPE and shape is not None:
            ctx.overlay.put_bytes(name, "I64", (2,), struct.pack("<2q", *shape))
        elif scales is not None and scheme is not None and scheme.symmetric and scheme.bits == 4:
            groups, n = scales.shape
            stored_zero = b"\x88" if stored_as_is(declared) else b"\x77"
            ctx.overlay.put_bytes(name, "I32", (groups, n // 8), stored_zero * (groups * n // 2))
        else:
            others.append(name)
    if len(others) < len(names):
        yield Fix(f"{count(len(names) - len(others), suffix)} made anew: it follows from the shape and the declaration")
    if others:
        yield from _new_scales(ctx, tuple(others), "is missing")


def stored_as_is(declared: Declaration | None) -> bool:
    """Whether a declaration stands for zero points that are stored as they are, not less one."""
    said = declared.content if declared is not None else {}
    return said.get("packing_format") == "auto_round" or said.get("checkpoint_format") == "gptq_v2"


def scale_unsound(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from _new_scales(ctx, finding.where, "is no sound number")


def _new_scales(ctx: Context, names: tuple[str, ...], what: str) -> Iterator[Fix | Left]:
    """A scale of activations from the shards of its fused linear, as the engine shares them; else the module in BF16 from the base."""
    shared, others = list[str](), list[str]()
    for name in names:
        value = sibling_scale(ctx.subject, name) if name.rpartition(".")[2] in INPUT_SCALES else None
        if value is None:
            others.append(name)
        else:
            set_scalar(ctx, name, value)
            shared.append(name)
    if shared:
        yield Fix(f"{count(len(shared), shared[0].rpartition('.')[2])} taken from the shards it is fused with, as the engine does")
    kv = [name for name in others if name.rpartition(".")[2] in KV_SCALES]
    modules = [name.rpartition(".")[0] for name in others if name not in kv]
    made = in_bf16(ctx, modules, damaged=not _only_inputs(others))
    yield from made.told(ctx)
    if kv:
        yield from _no_kv_scales(ctx, f"{kv[0]} {what}")
    if made.missing:
        takes = QUANTIZE_AGAIN if ctx.base is not None else f"--base SRC, which puts the module in BF16 in its place; or {QUANTIZE_AGAIN}"
        yield Left(f"a scale of {made.missing[0]} {what}, and nothing stored has it", takes)


def _only_inputs(names: list[str]) -> bool:
    """Whether it is scales of activations alone: the codes have all of their own scales then."""
    return all(name.rpartition(".")[2] in INPUT_SCALES for name in names)


def scale_orphan(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    for name in finding.where:
        ctx.overlay.drop(name)
    yield Fix(f"{count(len(finding.where), 'scale')} dropped, of modules that are not stored in that format")


def scale_implausible(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Numbers in the other layout's convention are turned back: a global scale of weights that is too large to be an amax (modelopt) or
    too small to be a reciprocal (compressed-tensors), and the scale of activations where all of the weights' are."""
    subject = ctx.subject
    turned, others = 0, list[str]()
    weights, inputs = next((pair for pair in SCALARS.values() if finding.where[0].rpartition(".")[2] in pair), SCALARS["nvfp4"])
    own = {name: value for name, value in subject.scalars.items() if name.endswith(f".{weights}")}
    everywhere = bool(own) and all(_is_reciprocal(weights, value) for value in own.values())
    for name in finding.where:
        module, _, suffix = name.rpartition(".")
        value = subject.scalars[name]
        if suffix == weights and _is_reciprocal(suffix, value):
            beside = [n for n in (f"{module}.{inputs}",) if everywhere and n in subject.scalars]
            for one in (name, *beside):
                set_scalar(ctx, one, turned_back(subject.scalars[one], sibling_scale(subject, one)))
            turned += 1
        elif not (everywhere and suffix == inputs):
            others.append(name)
    if turned:
        yield Fix(f"{count(turned, weights)} turned back from the reciprocal")
    if others:
        yield Left(
            f"it cannot be said what {others[0]} = {subject.scalars[others[0]]:.3g} should be",
            "compare it with the source: mtpress check CKPT --base SRC",
        )


def _is_reciprocal(suffix: str, value: float) -> bool:
    """Whether a global scale of weights stands in the other layout's convention for certain."""
    odd = value > LARGEST_AMAX if suffix == SCALE_2 else 0 < value < 1 / LARGEST_AMAX
    return odd and _within(suffix, 1 / value)


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
    """All shards in BF16: one in BF16 cannot be quantized without loss, and the others can be dequantized."""
    modules = [module for module in finding.where if ctx.subject.form(module) != "plain"]
    made = in_bf16(ctx, modules, damaged=False)
    yield from made.told(ctx, ", as the shard that is not quantized")
    if made.missing:
        takes = OTHER_BASE if ctx.base is not None else f"--base SRC, which puts all of them in BF16; or {QUANTIZE_AGAIN}"
        yield Left(f"shards of one linear are stored in different formats, and {made.missing[0]} cannot be had in BF16", takes)


def fused_input_scales_differ(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The largest number stored, which is what the engine takes in either layout."""
    subject = ctx.subject
    done = 0
    for linear in fused(subject):
        suffix = next((SCALARS[form][1] for form in SCALARS if subject.form(linear.modules[0]) == form), INPUT_SCALE)
        names = [f"{module}.{suffix}" for module in linear.modules]
        values = {name: subject.scalars[name] for name in names if name in subject.scalars}
        if set(linear.modules) & set(finding.where) and len(values) == len(names) and all(map(math.isfinite, values.values())):
            for name in [name for name, value in values.items() if value != max(values.values())]:
                set_scalar(ctx, name, max(values.values()))
                done += 1
    if done:
        yield Fix(f"{count(done, 'scale')} of activations set to the one of its fused linear that the engine takes")
    else:
        yield Left("some of the scales are no sound numbers", QUANTIZE_AGAIN)


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
        shards = [shard_of(subject, module) for module in linear.modules]
        whole = [shard for shard in shards if shard is not None]
        if len(whole) < len(shards) or any(ctx.overlay.is_computed(info.name) for s in whole for info in (s.codes, s.blocks)):
            costs[linear.prefix] = math.nan
        elif not ctx.may_read:
            for shard in whole:
                set_scalar(ctx, shard.scalar, max(subject.scalars[s.scalar] for s in whole))
            done.append(linear.prefix)
        else:
            told += not ctx.ancestor and wrong_label(ctx, whole)
            cost = share(ctx, whole)
            if cost is None:
                done.append(linear.prefix)
            else:
                costs[linear.prefix] = cost
    if done:
        label = f"; in {told} the scale itself was wrong, by the base" if told else ""
        sure = "" if ctx.may_read else ", if E4M3 allows it"
        how = "given one global scale: block scales written anew, codes untouched, every weight keeps its value"
        yield Fix(f"{count(len(done), 'fused linear')} {how}{sure}{label}")
    if costs:
        worst = max(costs, key=lambda prefix: costs[prefix])
        yield Left(
            f"{count(len(costs), 'fused linear')} cannot share a global scale exactly; to round the block scales would change {worst} by "
            f"{costs[worst]:.3g} (‖ŵ′ − ŵ‖/‖ŵ‖)",
            QUANTIZE_AGAIN,
        )


@dataclass(frozen=True)
class Shard:
    """A shard of a fused NVFP4 linear, in either layout. scale_2: what its block scales are multiplied with; scalar: its name."""

    module: str
    codes: TensorInfo
    blocks: TensorInfo
    scalar: str
    scale_2: float
    reciprocal: bool


def shard_of(subject: Subject, module: str) -> Shard | None:
    """None where the module is not whole NVFP4."""
    form, tensors = subject.form(module), subject.modules.get(module, {})
    if form not in SCALARS:
        return None
    scalar = f"{module}.{SCALARS[form][0]}"
    codes, blocks = tensors.get(WEIGHT if form == "nvfp4" else WEIGHT_PACKED), tensors.get(SCALE)
    value = subject.scalars.get(scalar, 0.0)
    if codes is None or blocks is None or blocks.dtype != "F8_E4M3" or not (value > 0 and math.isfinite(value)):
        return None
    reciprocal = form != "nvfp4"
    return Shard(module, codes, blocks, scalar, float32(1 / value) if reciprocal else value, reciprocal)


def wrong_label(ctx: Context, shards: list[Shard]) -> bool:
    """With a base: gives every shard the largest global scale where that brings the weights nearer to the source than its own does."""
    from mtpress.comparison.weights import relative_error

    subject = ctx.subject
    largest = max(shards, key=lambda shard: shard.scale_2)
    changed = False
    for shard in shards:
        origin = base_tensor(ctx, f"{shard.module}.{WEIGHT}", subject.called_for.get(f"{shard.module}.{WEIGHT}"))
        if shard.scale_2 == largest.scale_2 or origin is None:
            continue
        scales = [ctx.overlay.kept_aside("F32", (), struct.pack("<f", s.scale_2)) for s in (shard, largest)]
        own, theirs = (relative_error(shard.codes, shard.blocks, scale, origin)[0] for scale in scales)
        if theirs < own:
            set_scalar(ctx, shard.scalar, subject.scalars[largest.scalar])
            changed = True
    return changed


def share(ctx: Context, shards: list[Shard]) -> float | None:
    """Gives shards one global scale if no weight changes by it: None, and else what the best one would cost.

    Reads the block scales and, as blocks of zeros take any scale, the codes.
    """
    from mtpress.formats.nvfp4_rescale import Member, best_shared_scale, energies

    shards = [again for shard in shards if (again := shard_of(ctx.subject, shard.module)) is not None]  # as wrong_label() left them
    if len({shard.scale_2 for shard in shards}) == 1:
        return None
    try:
        members = [Member(shard.scale_2, energies(read_tensor(shard.blocks), read_tensor(shard.codes))) for shard in shards]
    except ValueError:
        return math.nan
    shared = best_shared_scale(members)
    stored = next((ctx.subject.scalars[s.scalar] for s in shards if s.scale_2 == shared.scale_2), None)
    if stored is None:
        stored = float32(1 / shared.scale_2) if shards[0].reciprocal else shared.scale_2
        if shards[0].reciprocal and float32(1 / stored) != shared.scale_2:
            return max((*shared.relative_errors, 2.0**-23))
    if not shared.exact:
        return max(shared.relative_errors)
    for shard in shards:
        if shard.scale_2 != shared.scale_2:
            info = shard.blocks
            ctx.overlay.compute(info.name, info.dtype, info.shape, partial(_rewritten, info, shard.scale_2, shared.scale_2))
            set_scalar(ctx, shard.scalar, stored)
    return None


def _rewritten(blocks: TensorInfo, own: float, shared: float) -> "torch.Tensor":
    from mtpress.formats.nvfp4_rescale import reexpress

    return reexpress(read_tensor(blocks), own, shared).scales


def zeros_convention(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Symmetric zero points of 4 bits: 8 stored less one by GPTQ's first version and auto_round:auto_gptq, as it is by the others."""
    declared, subject = ctx.subject.declared, ctx.subject
    said = declared.content if declared is not None else {}
    as_is = stored_as_is(declared)
    if said.get("bits") != 4:
        yield Left("only zero points of 4 bits are rewritten", QUANTIZE_AGAIN)
        return
    for name in finding.where:
        info = subject.tensors[name]
        ctx.overlay.put_bytes(name, info.dtype, info.shape, (b"\x88" if as_is else b"\x77") * info.num_bytes)
    yield Fix(f"{count(len(finding.where), 'tensor')} of zero points written in the convention of the declared layout")


def zeros_asymmetric(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The modules in BF16, where they are few: their codes are of other zero points than the engine takes."""
    modules = [name.rpartition(".")[0] for name in finding.where]
    few = len(modules) <= LARGEST_SHARE * len(ctx.subject.quantized)
    made = in_bf16(ctx, modules, damaged=False) if few else InBF16(missing=modules)
    yield from made.told(ctx)
    if made.missing:
        yield Left(
            f"the codes of {count(len(made.missing), 'module')} were made for other zero points than the engine takes", QUANTIZE_AGAIN
        )


def kv_scale_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from _no_kv_scales(ctx, f"{finding.where[0]} is missing")


def _no_kv_scales(ctx: Context, what: str) -> Iterator[Fix | Left]:
    """All dropped, which makes every scale 1, as vLLM makes the missing ones; not where a stored one says that this is too small."""
    held = [name for name in ctx.subject.tensors if name.endswith(tuple(f".{suffix}" for suffix in KV_SCALES))]
    if any(ctx.subject.scalars.get(name, 1.0) > 1 for name in held):
        yield Left(f"{what}, and nothing stored has it", QUANTIZE_AGAIN)
        return
    for name in held:
        ctx.overlay.drop(name)
    yield Fix(f"{count(len(held), 'scale')} of the KV cache dropped: all are 1 then, as with fp8_cast")


def kv_scale_misplaced(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    for name in finding.where:
        ctx.overlay.drop(name)
    yield Fix(f"{count(len(finding.where), 'scale')} of a KV cache dropped, of modules that have none")


def input_scales_unused(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    for name in finding.where:
        ctx.overlay.drop(name)
    yield Fix(f"{count(len(finding.where), INPUT_SCALE)} dropped, as vLLM does")


REPAIRS = (
    Repair("scale-missing", "input_scale from the shards of its fused linear; where no module has one, activations are declared to stay in "
           "16 bits; else the module is dequantized to BF16; any other: the module in BF16 from the base (`--base`)", scale_missing),
    Repair("scale-orphan", "dropped", scale_orphan, Turn.DROPS),
    Repair("scale-unsound", "input_scale from the shards of its fused linear; of the KV cache, all are dropped, which makes them 1; any "
           "other: the module in BF16 from the base (`--base`)", scale_unsound),
    Repair("scale-implausible", "a reciprocal weight_scale_2 is turned back, and input_scale where all are reciprocals; else left",
           scale_implausible, Turn.CONFIG),
    Repair("fused-formats-differ", "all shards in BF16: dequantized or, where codes cannot be, from the base (`--base`)",
           fused_formats_differ),
    Repair("fused-scales-differ", "one global scale, block scales anew, codes untouched, where every weight keeps its value exactly; "
           "else left, with the error it would cost. `--base` tells a global scale that is wrong from one that is not shared",
           fused_scales_differ),
    Repair("fused-input-scales-differ", "set to the largest of the linear, as the engine does", fused_input_scales_differ),
    Repair("zeros-convention", "the zero points are written in the convention of the declared layout", zeros_convention),
    Repair("zeros-asymmetric", "the module dequantized to BF16, where they are few; else left", zeros_asymmetric),
    Repair("in-proj-ab-quantized", "nothing is wrong, it is a choice of the build"),
    Repair("kv-scale-missing", "the others are dropped too, which makes all of them 1, where none of them is larger; else left",
           kv_scale_missing, Turn.DROPS),
    Repair("kv-scale-misplaced", "dropped", kv_scale_misplaced, Turn.DROPS),
    Repair("input-scales-unused", "dropped, as vLLM does", input_scales_unused),
)  # fmt: skip
