"""Repairs of the draft head: from the base bit for bit, dequantized where there is none, renamed, declared."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from mtpress.comparison.weights import counterpart
from mtpress.quant_config.stored import PLAIN_DTYPES
from mtpress.repairs.bf16 import drop_scales, in_bf16
from mtpress.repairs.from_source import base_tensor, not_there
from mtpress.repairs.repair import Context, Fix, Left, Repair, Turn, needs_base
from mtpress.repairs.unplaced import may_be, told
from mtpress.rules.rule import Finding

HOW_IT_DRAFTS = "it was not trained with this body, so fewer of its drafts may be accepted: mtpress bench --mtp off,1 measures it"


def head_from_base(ctx: Context, *, whole: bool = False) -> Iterator[Fix | Left]:
    """What is absent or packed of the head; what is stored of it in 16 or 32 bits stays, unless all of it is asked for."""
    subject = ctx.subject
    shapes = subject.model.mtp_shapes(subject.config)
    own = {n for n in shapes if (i := subject.tensors.get(n)) and i.dtype in PLAIN_DTYPES and not whole}
    if own_names := may_be(subject, shapes):
        yield told(own_names)
        return
    if ctx.base is None:
        yield needs_base("the draft head")
        return
    found = {name: base_tensor(ctx, name, shape) for name, shape in shapes.items() if name not in own}
    if lacking := [name for name, info in found.items() if info is None]:
        yield not_there(ctx, lacking[0], f"the base has no draft head that fits: {lacking[0]} is missing or of another shape")
        return
    for name, info in found.items():
        drop_scales(ctx.overlay, ctx.subject, subject.model.module_of(name))
        assert info is not None
        ctx.overlay.put(name, info)
    what = f"{len(found)} tensors of the draft head" if own else f"the {len(found)} tensors of the draft head"
    stays = f"; the other {len(own)} stay as they are" if own else ""
    yield Fix(f"{what} put from {ctx.whose}, bit for bit{stays}" + (f"; {HOW_IT_DRAFTS}" if ctx.ancestor else "") + other_vocabulary(ctx))


def other_vocabulary(ctx: Context) -> str:
    """Of a head that drafts with embeddings of other rows than those it was trained with: what to know of it; else nothing."""
    theirs = counterpart("embed_tokens.weight", ctx.theirs)
    mine = next((info for name, info in ctx.subject.tensors.items() if name.endswith("embed_tokens.weight")), None)
    if theirs is None or mine is None or theirs.shape == mine.shape:
        return ""
    return f"; it drafts with the checkpoint's {mine.shape[0]} embeddings, and was trained with {theirs.shape[0]}"


def mtp_missing(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from head_from_base(ctx)


def mtp_none(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    if ctx.base is not None and not ctx.subject.model.num_mtp_layers(ctx.base.config):
        yield Left("the base has no draft head either", "a base that has one: mtpress graft CKPT OUT --from BASE")
    else:
        yield from head_from_base(ctx)


def mtp_unindexed(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield Fix("the index names the draft head")


def mtp_quantized(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from unpacked(ctx, finding.where)


def unpacked(ctx: Context, modules: Iterable[str]) -> Iterator[Fix | Left]:
    """The base's head where the codes are that, rounded; else, and without a base, what the codes stand for."""
    modules = list(modules)
    own = [module for module in modules if ctx.base is None or _trained(ctx, module)]
    made = in_bf16(ctx, own, damaged=False)
    yield from made.told(ctx, "; they are not the base's, rounded" if ctx.base is not None else "")
    if ctx.base is not None and len(own) < len(modules):
        yield from head_from_base(ctx)
    elif made.missing:
        yield needs_base(f"{made.missing[0]} in BF16")


def _trained(ctx: Context, module: str) -> bool:
    """Whether a packed module is further from the base's than rounding brings it, and no damage."""
    near = ctx.comparison.closeness.get(module) if ctx.comparison is not None else None
    return near is not None and near.state == "changed"


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
    Repair("mtp-missing", "what is missing of the head is put from the base (`--base`), bit for bit", mtp_missing),
    Repair("mtp-unindexed", "the index names it; out of a folder below it goes into a shard of its own", mtp_unindexed),
    Repair("mtp-quantized", "put from the base (`--base`), bit for bit; without one, and where the codes are not its head rounded, "
           "dequantized to BF16", mtp_quantized),
    Repair("mtp-rounded", "as `mtp-quantized`", mtp_quantized),
    Repair("mtp-fp8", "nothing is wrong: vLLM drafts with it"),
    Repair("mtp-not-declared", "mtp_num_hidden_layers is set to 1", declared, Turn.CONFIG),
    Repair("mtp-layer-count", "mtp_num_hidden_layers is set to 1", declared, Turn.CONFIG),
    Repair("mtp-none", "the base's head is put in (`--base`), where it has one", mtp_none),
)  # fmt: skip
