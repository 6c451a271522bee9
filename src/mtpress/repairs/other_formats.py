"""Repairs of modules in another format than the one declared."""

from collections.abc import Iterator

from mtpress.models.qwen3_5.names import MTP_PREFIX
from mtpress.quant_config import stored
from mtpress.repairs.bf16 import in_bf16
from mtpress.repairs.declaration import declare, is_declarable
from mtpress.repairs.draft_head import unpacked
from mtpress.repairs.repair import OTHER_BASE, Context, Fix, Left, Repair, Turn
from mtpress.rules.rule import QUANTIZE_AGAIN, Finding


def format_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Where a declaration can stand for all that is stored, it is written; where some modules are in another form, they are in BF16
    again."""
    subject = ctx.subject
    forms = {subject.form(module) for module in subject.quantized}
    if is_declarable(ctx):
        yield from declare(ctx)
        return
    head = [module for module in finding.where if module.startswith(MTP_PREFIX)]
    if head:
        yield from unpacked(ctx, head)
    made = in_bf16(ctx, (module for module in finding.where if module not in head), damaged=False)
    yield from made.told(ctx)
    if made.missing:
        titles = ", ".join(sorted(stored.TITLES[form] for form in forms))
        takes = OTHER_BASE if ctx.base is not None else f"--base SRC, which puts them in BF16; or {QUANTIZE_AGAIN}"
        yield Left(f"modules are stored as {titles}, and {made.missing[0]} cannot be had in BF16", takes)


REPAIRS = (
    Repair("format-differs", "where one declaration can stand for all that is stored, it is written; else modules of another form are "
           "dequantized to BF16, or put from the base (`--base`)", format_differs, Turn.TENSORS),
)  # fmt: skip
