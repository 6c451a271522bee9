"""Repairs of what a comparison with the base finds: what is damaged becomes the base's, what merely differs is told.

In: the findings of rules/against_source.py. Out: the base's numbers in place of those that are NaN or infinite. A tensor that is finite
and in its shape is its author's, whatever the base has: only where the user says that the base is the source (--base-is source) does it
become the base's. Leaves out: the comparison.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from mtpress.checkpoint.safetensors import TensorInfo, read_tensor, torch_dtype
from mtpress.repairs.bf16 import in_bf16
from mtpress.repairs.draft_head import head_from_base
from mtpress.repairs.from_source import base_tensor, not_there
from mtpress.repairs.repair import STAYS, Context, Fix, Left, Repair, told_unless_source
from mtpress.repairs.tensors import is_exact
from mtpress.rules.rule import QUANTIZE_AGAIN, Finding
from mtpress.terminal import count

if TYPE_CHECKING:
    import torch


def not_finite(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Only the numbers that are NaN or infinite: the others stay."""
    done, missing = list[str](), list[str]()
    for name in finding.where:
        origin = base_tensor(ctx, name, ctx.subject.tensors[name].shape)
        if origin is None:
            missing.append(name)
            continue
        info = ctx.overlay.places[name].info
        wide = info.dtype in ("F16", "F32") and len(info.shape) > 1 and origin.dtype == "BF16"
        dtype = "BF16" if wide and is_exact(info, "BF16") else info.dtype
        ctx.overlay.compute(name, dtype, info.shape, partial(patched, info, origin, dtype))
        done.append(name)
    if done:
        yield Fix(
            f"{ctx.whose}'s numbers put in the place of those that are NaN or infinite in {', '.join(done[:3])}{', …' * (len(done) > 3)}"
        )
    if missing:
        yield not_there(ctx, missing[0], f"the base has no {missing[0]} of that shape")


def patched(info: TensorInfo, origin: TensorInfo, dtype: str) -> "torch.Tensor":
    """A stored tensor in `dtype`, with another's numbers where its own are not finite."""
    import torch

    mine = read_tensor(info).to(torch_dtype(dtype))
    return torch.where(mine.isfinite(), mine, read_tensor(origin).to(mine.dtype))


def differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    done, missing = list[str](), list[str]()
    for name in finding.where:
        if (origin := base_tensor(ctx, name, ctx.subject.tensors[name].shape)) is not None:
            ctx.overlay.put(name, origin)
            done.append(name)
        else:
            missing.append(name)
    if done:
        yield Fix(f"{count(len(done), 'tensor')} put from the base, bit for bit")
    if missing:
        yield not_there(ctx, missing[0], "the base has not all of them in that shape")


def mtp_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from head_from_base(ctx, whole=True)


def matrices(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Matrices of which no number can be had from their codes, in BF16 from the base."""
    made = in_bf16(ctx, finding.where, damaged=True)
    yield from made.told(ctx)
    if made.missing:
        yield Left(f"the base has no {made.missing[0]} of that shape", QUANTIZE_AGAIN)


REPAIRS = (
    Repair("base-ancestor", "nothing is wrong: what differs from an ancestor is its author's"),
    Repair("base-stranger", "nothing is taken from another model"),
    Repair("not-finite", "the base's numbers in the place of those that are NaN or infinite, the others stay (`--base`)", not_finite),
    Repair("mtp-differs", STAYS + "the whole head is put from the base, bit for bit", told_unless_source(mtp_differs, "the draft head")),
    Repair("kept-differs", STAYS + "put from the base, bit for bit", told_unless_source(differs, "a kept tensor")),
    Repair("kept-unrelated", "left as it is: it may have been trained anew"),
    Repair("tokens-moved", "left: whether tokenizer or embeddings are wrong, only its author knows"),
    Repair("rows-zeroed", "left as they are: rows may have been pruned"),
    Repair("base-lacks", "nothing to compare with, nothing to take"),
    Repair("not-compared", "nothing is known to be wrong"),
    Repair("blocks-broken", "the module in BF16 from the base", matrices),
    Repair("blocks-empty", STAYS + "the module in BF16 from the base", told_unless_source(matrices, "a block scale")),
    Repair("channels-lost", STAYS + "the module in BF16 from the base", told_unless_source(matrices, "a quantized matrix")),
    Repair("error-large", STAYS + "the module in BF16 from the base", told_unless_source(matrices, "a quantized matrix")),
    Repair("error-outlier", "an outlier is a choice to look at, not a fault"),
)  # fmt: skip
