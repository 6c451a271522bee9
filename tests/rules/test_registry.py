"""The rules as a whole: ids that last, documentation in step."""

import re
from pathlib import Path

from mtpress.formats import nvfp4
from mtpress.quant_config import stored
from mtpress.rules.registry import ALL_RULES, table

ROOT = Path(__file__).resolve().parents[2]


def test_ids_are_unique_and_kebab_case() -> None:
    ids = [rule.id for rule in ALL_RULES]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in ids)


def test_every_rule_says_what_it_means_and_what_to_do() -> None:
    for rule in ALL_RULES:
        assert rule.severity in ("error", "warning", "note")
        assert rule.meaning.endswith("."), rule.id
        assert rule.remedy, rule.id
        assert "|" not in rule.meaning + rule.remedy, rule.id


def test_the_documented_table_is_the_registry() -> None:
    text = (ROOT / "docs/check.md").read_text(encoding="utf-8")
    assert "\n".join(table()).strip() in text


def test_the_layout_of_nvfp4_is_that_of_the_format() -> None:
    expected = nvfp4.output_tensors((128, 64))
    assert set(stored.SUFFIXES["nvfp4"]) == set(expected)
    assert expected[stored.SCALE] == ("F8_E4M3", (128, 64 // nvfp4.GROUP_SIZE))
