"""Every repair, by the id of the rule whose finding it mends; a rule that has none has an entry that says why."""

from collections.abc import Iterator

from mtpress.repairs import against_source as base
from mtpress.repairs import (
    config,
    declaration,
    draft_head,
    files,
    meanings,
    names,
    other_formats,
    scales,
    template,
    tensors,
    tokenizer,
    untouched,
    vision,
)
from mtpress.repairs.repair import Repair

REPAIRS: dict[str, Repair] = {
    repair.rule_id: repair
    for topic in (
        files,
        config,
        names,
        tensors,
        declaration,
        other_formats,
        scales,
        draft_head,
        vision,
        tokenizer,
        template,
        base,
        meanings,
        untouched,
    )
    for repair in topic.REPAIRS
}


def table() -> Iterator[str]:
    """The table of docs/repair.md, line by line: every rule, in the order of check, and what repair does about it."""
    from mtpress.rules.registry import ALL_RULES

    yield from ("| finding of check | severity | what repair does |", "|---|---|---|")
    for rule in ALL_RULES:
        repair = REPAIRS[rule.id]
        yield f"| `{rule.id}` | {rule.severity} | {'' if repair.mend else 'none: '}{repair.summary} |"
