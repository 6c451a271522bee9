"""Repairs of the draft head: from the base bit for bit, dequantized where there is none, renamed, declared."""

import copy
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from mtpress.checkpoint import TensorInfo, read_tensor
from mtpress.models.qwen3_5 import MTP_PREFIX
from mtpress.repairs.base_files import base_tensor, drop_scales
from mtpress.repairs.repair import OTHER_BASE, Context, Fix, Left, Repair, Turn, needs_base
from mtpress.rules.rule import Finding, count
from mtpress.rules.stored import SCALE, SCALE_2, WEIGHT, Form

if TYPE_CHECKING:
    import torch

# What a quantized matrix is computed from, by its form.
PARTS: dict[Form, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales"),
    "nvfp4": (WEIGHT, SCALE, SCALE_2),
    "nvfp4-pack-quantized": ("weight_packed", SCALE, "weight_global_scale"),
}


def head_from_base(ctx: Context) -> Iterator[Fix | Left]:
    """All of the head: of two heads no half fits the other."""
    if ctx.base is None:
        yield needs_base("the draft head")
        return
    subject = ctx.subject
    found = {name: base_tensor(ctx, name, shape) for name, shape in subject.model.mtp_shapes(subject.config).items()}
    if lacking := [name for name, info in found.items() if info is None]:
        yield Left(f"the base has no draft head that fits: {lacking[0]} is missing or of another shape", OTHER_BASE)  # fmt: skip
        return
    for name in [name for name in subject.tensors if name.startswith(MTP_PREFIX) and name not in found]:
        ctx.overlay.drop(name)
    for name, info in found.items():
        assert info is not None
        ctx.overlay.put(name, info)
    yield Fix(f"the {len(found)} tensors of the draft head put from the base, bit for bit")


def mtp_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from head_from_base(ctx)


def mtp_none(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.base is not None and not ctx.subject.model.num_mtp_layers(ctx.base.config):
        yield Left("the base has no draft head either", "a base that has one: mtpress graft CKPT OUT --from BASE")
    else:
        yield from head_from_base(ctx)


def mtp_misplaced(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Renames what is not there under its own name yet, and drops what is."""
    renamed = dropped = 0
    for name in finding.where:
        new = MTP_PREFIX + name.partition(MTP_PREFIX)[2]
        if new in ctx.subject.tensors or new in ctx.overlay.places:
            ctx.overlay.drop(name)
            dropped += 1
        else:
            ctx.overlay.rename(name, new)
            renamed += 1
    said = [f"{count(renamed, 'tensor')} renamed to {MTP_PREFIX}*"] * bool(renamed)
    yield Fix("; ".join([*said, *[f"{count(dropped, 'tensor')} dropped, which stand under {MTP_PREFIX} too"] * bool(dropped)]))


def mtp_unindexed(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield Fix("the index names the draft head")


def mtp_quantized(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """From the base or, without one, the stored codes dequantized: float32, then rounded to BF16."""
    if ctx.base is not None:
        yield from head_from_base(ctx)
        return
    subject = ctx.subject
    done = list[str]()
    for module in finding.where:
        form, tensors = subject.form(module), subject.modules[module]
        names = PARTS.get(form, ())
        shape = subject.called_for.get(f"{module}.{WEIGHT}")
        if shape is None or not names or not set(names) <= tensors.keys() or shape != stored_shape(form, tensors):
            continue
        infos = tuple(ctx.overlay.places[f"{module}.{suffix}"].info for suffix in names)
        drop_scales(ctx.overlay, subject, module)
        ctx.overlay.compute(f"{module}.{WEIGHT}", "BF16", shape, partial(dequantized, form, infos))
        done.append(module)
    if done:
        yield Fix(f"{count(len(done), 'module')} dequantized to BF16, the value that its codes stand for")
    if len(done) < len(finding.where):
        left = next(module for module in finding.where if module not in done)
        yield needs_base(f"{left} in BF16")


def stored_shape(form: Form, tensors: Mapping[str, TensorInfo]) -> tuple[int, ...] | None:
    """[N, K] of the matrix that INT4 or NVFP4 tensors hold, by their headers; None where they are of no one matrix."""
    first, second, third = (tensors[suffix].shape for suffix in PARTS[form])
    if len(first) != 2 or not all(first):
        return None
    if form == "gptq":
        words, n = first
        groups = third[0] if third else 0
        whole = second == (groups, n // 8) and third == (groups, n) and groups and words * 8 % groups == 0
        return (n, words * 8) if whole else None
    n, half = first
    return (n, 2 * half) if second == (n, half // 8) and math.prod(third) == 1 else None


def dequantized(form: Form, infos: tuple[TensorInfo, ...]) -> "torch.Tensor":
    """BF16 [N, K] of a stored matrix: (code − zero) · scale or code · block scale · global scale in float32, rounded to nearest.

    For INT4 this is how a published AutoRound build of Qwen3.6-27B brought mtp.fc back.
    """
    import torch

    from mtpress.formats import compressed_tensors, int4, nvfp4

    parts = [read_tensor(info) for info in infos]
    if form == "gptq":
        return int4.dequantize(*parts).to(torch.bfloat16)
    codes, blocks, scale = parts
    scale_2 = compressed_tensors.reciprocal(scale) if form == "nvfp4-pack-quantized" else scale
    return nvfp4.dequantize(codes, blocks, scale_2.reshape(())).to(torch.bfloat16)


def declared(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """mtp_num_hidden_layers 1 where the family has it, and nowhere else; num_nextn_predict_layers is another family's word."""
    config = copy.deepcopy(ctx.overlay.config)
    inner: Any = config.get("text_config")
    level = inner if isinstance(inner, dict) else config
    for place in (config, level):
        place.pop("mtp_num_hidden_layers", None)
        place.pop("num_nextn_predict_layers", None)
    level["mtp_num_hidden_layers"] = 1
    ctx.overlay.set_config(config)
    yield Fix("mtp_num_hidden_layers set to 1" + (" in text_config" if level is inner else ""))


REPAIRS = (
    Repair("mtp-missing", "the whole head is put from the base (`--base`), bit for bit", mtp_missing),
    Repair("mtp-misplaced", "renamed to `mtp.`", mtp_misplaced, Turn.CONFIG),
    Repair("mtp-unindexed", "the index names it", mtp_unindexed),
    Repair("mtp-quantized", "the whole head is put from the base (`--base`); without one INT4 and NVFP4 are dequantized to BF16, "
           "which is what the codes stand for", mtp_quantized),
    Repair("mtp-rounded", "as `mtp-quantized`", mtp_quantized),
    Repair("mtp-not-declared", "mtp_num_hidden_layers is set to 1", declared, Turn.CONFIG),
    Repair("mtp-layer-count", "mtp_num_hidden_layers is set to 1", declared, Turn.CONFIG),
    Repair("mtp-none", "the base's head is put in (`--base`), where it has one", mtp_none),
)  # fmt: skip
