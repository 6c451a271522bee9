"""Repairs of modules in another format than the one declared."""

from collections.abc import Iterator

from mtpress.repairs.base_files import bring_back
from mtpress.repairs.declaration import DECLARED_AS, declare
from mtpress.repairs.mixed_precision import stored_formats
from mtpress.repairs.repair import OTHER_BASE, Context, Fix, Left, Repair, Turn
from mtpress.rules import stored
from mtpress.rules.rule import QUANTIZE_AGAIN, Finding, count


def format_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Where all modules are in one form, or in modelopt's NVFP4 and FP8, that is declared; where some are in another, they are the base's
    BF16 again."""
    subject = ctx.subject
    forms = {subject.form(module) for module in subject.quantized}
    if (len(forms) == 1 and forms <= DECLARED_AS.keys()) or stored_formats(subject) is not None:
        yield from declare(ctx)
        return
    if ctx.base is None:
        titles = ", ".join(sorted(stored.TITLES[form] for form in forms))
        yield Left(f"modules are stored as {titles}", "--base SRC, which puts those that are not of the declared format in "
                   f"BF16; or {QUANTIZE_AGAIN}")  # fmt: skip
        return
    done, missing = bring_back(ctx, finding.where)
    if done:
        yield Fix(f"{count(len(done), 'module')} put from the base in BF16, bit for bit")
    if missing:
        yield Left(f"the base has no {missing[0]} of that shape", OTHER_BASE)


REPAIRS = (
    Repair("format-differs", "where all modules are in one form, or in modelopt's NVFP4 and FP8, that is declared; else those of another "
           "form are put in BF16 from the base (`--base`)", format_differs, Turn.TENSORS),
)  # fmt: skip
