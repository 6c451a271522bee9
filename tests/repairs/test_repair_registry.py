"""The repairs as a whole: one for every rule, or a reason; documentation in step."""

from pathlib import Path

from mtpress.repairs.registry import REPAIRS, table
from mtpress.rules.registry import ALL_RULES, BASE_RULES, OPEN_RULES, STATIC_RULES

DOCS = Path(__file__).parents[2] / "docs/repair.md"


def test_every_rule_has_a_repair_or_a_reason() -> None:
    assert REPAIRS.keys() == {rule.id for rule in ALL_RULES}
    for repair in REPAIRS.values():
        assert repair.summary
        assert "|" not in repair.summary


def test_every_error_that_can_be_decided_on_disk_has_a_repair() -> None:
    """Of what is an error and needs no engine and no hash, only these have none: nothing is taken from a stranger, and no tokenizer of an
    ancestor."""
    errors = {rule.id for rule in (*OPEN_RULES, *STATIC_RULES, *BASE_RULES) if rule.severity == "error"}
    assert {rule_id for rule_id in errors if REPAIRS[rule_id].mend is None} == {"base-stranger", "tokens-moved"}


def test_the_documented_table_is_the_registry() -> None:
    assert "\n".join(table()) in DOCS.read_text(encoding="utf-8")
