"""Repairs of what a comparison with the base finds in the weights: kept tensors are the base's again.

In: the findings of rules/base.py. Out: the base's tensors in place of those that differ. Leaves out: the comparison.
"""

from collections.abc import Iterator

from mtpress.repairs.base_files import LARGEST_SHARE, base_tensor, bring_back
from mtpress.repairs.draft_head import head_from_base
from mtpress.repairs.repair import OTHER_BASE, Context, Fix, Left, Repair
from mtpress.rules.base import LARGEST_ERROR
from mtpress.rules.rule import QUANTIZE_AGAIN, Finding, count


def mtp_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    yield from head_from_base(ctx)


def kept_differs(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """The base's tensors, but not in layers whose quantized matrices are far from the base's too."""
    assert ctx.comparison is not None
    layer_of = ctx.subject.model.layer_index
    far = {layer_of(module + ".") for module, error in ctx.comparison.error.items() if not error <= LARGEST_ERROR}
    done, folded = list[str](), list[str]()
    for name in finding.where:
        origin = base_tensor(ctx, name, ctx.subject.tensors[name].shape)
        if layer_of(name) in far:
            folded.append(name)
        elif origin is not None:
            ctx.overlay.put(name, origin)
            done.append(name)
    if done:
        yield Fix(f"{count(len(done), 'tensor')} put from the base, bit for bit")
    if folded:
        yield Left(
            f"{folded[0]}: quantized matrices of its layer are further than {LARGEST_ERROR} from the base too; it may be folded into them",
            OTHER_BASE,
        )


def far_matrices(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Matrices that cannot be what was quantized, back in BF16, where they are few."""
    if len(finding.where) > LARGEST_SHARE * len(ctx.subject.quantized):
        yield Left(
            f"{len(finding.where)} of {len(ctx.subject.quantized)} quantized matrices are so: it is not its source, or made wrongly",
            QUANTIZE_AGAIN,
        )
        return
    done, missing = bring_back(ctx, finding.where)
    if done:
        yield Fix(f"{count(len(done), 'module')} put from the base in BF16, bit for bit")
    if missing:
        yield Left(f"the base has no {missing[0]} of that shape", QUANTIZE_AGAIN)


REPAIRS = (
    Repair("mtp-differs", "the whole head is put from the base, bit for bit", mtp_differs),
    Repair("kept-differs", "put from the base, bit for bit; left where the matrices of the layer are far from the base's too, as norms may "
           "have been folded into them", kept_differs),
    Repair("base-lacks", "nothing to compare with, nothing to take"),
    Repair("not-compared", "nothing is known to be wrong"),
    Repair("blocks-broken", "the module in BF16 from the base", far_matrices),
    Repair("error-large", f"the module in BF16 from the base, where that is at most {LARGEST_SHARE:.0%} of them; else left", far_matrices),
    Repair("error-outlier", "left: an outlier is a choice to look at, not a fault"),
)  # fmt: skip
