"""Repairs of names: tensors of the family that stand under others are renamed; none is dropped that is not there twice, byte for byte."""

from collections import defaultdict
from collections.abc import Iterator

from mtpress.comparison.weights import same_bytes
from mtpress.quant_config.misnamed import refuse_head_alone
from mtpress.repairs.repair import Context, Fix, Left, Repair, Turn
from mtpress.rules.rule import Finding
from mtpress.terminal import count


def renamed(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    """Every misnamed tensor gets its name; of equal ones that claim one name, one does and the others leave."""
    names, overlay = ctx.subject.names, ctx.overlay
    if not names:
        yield Left("no name of it ends as one of the family's does", "fetch or make the checkpoint again")
        return
    claims: dict[str, list[str]] = defaultdict(list)
    for name, wanted in names.rivals.items():
        claims[wanted].append(name)
    done, equal, differing = dict(names.new_names), list[str](), list[str]()
    for wanted, rivals in claims.items():
        there = [wanted] * (wanted in overlay.places)
        first, *others = [overlay.places[name].info for name in (*there, *rivals)]
        if ctx.may_read and not all(first.dtype == other.dtype and same_bytes(first, other) for other in others):
            differing += rivals
            continue
        if not there:
            done[rivals[0]] = wanted
        equal += rivals if there else rivals[1:]
    for name, wanted in done.items():
        overlay.rename(name, wanted)
    for name in equal:
        overlay.drop(name)
    said = [f"{count(len(done), 'tensor')} renamed: {names.told().replace(', must be ', ' → ')}"] * bool(done)
    if equal:
        equally = "equal" if ctx.may_read else "if equal"
        said.append(f"{count(len(equal), 'tensor')} dropped, {equally} byte for byte to what has the name")
    if said:
        yield Fix("; ".join(said))
    if differing:
        yield Left(
            f"{count(len(differing), 'tensor')} ({differing[0]}, …) claim a name that another tensor with other values has or claims",
            f"drop or rename {'it' if len(differing) == 1 else 'those'} that should not count, then repair again",
        )


def head_alone(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
    refuse_head_alone(ctx.subject)
    yield Left("the body is gone", finding.remedy)


REPAIRS = (
    Repair("head-alone", "refused: `mtpress graft CKPT OUT --from` it puts it into a checkpoint that has a body", head_alone),
    Repair(
        "body-prefix",
        "the tensors are renamed; of two that claim one name, equal ones become one, others are left",
        renamed,
        Turn.NAMES,
    ),
    Repair("names-wrapped", "as `body-prefix`", renamed, Turn.NAMES),
    Repair("names-of-the-engine", "as `body-prefix`", renamed, Turn.NAMES),
    Repair("mtp-misplaced", "as `body-prefix`", renamed, Turn.NAMES),
)
