"""Every rule fires on a checkpoint that is broken in its way, and no other rule does."""

import json
import shutil
from pathlib import Path

import pytest

from breaks import CASES, Break
from checkpoints import Edit
from mtpress.rules.registry import STATIC_RULES
from mtpress.stages.check import check


@pytest.mark.parametrize(("expected", "function"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_checkpoint(expected: set[str], function: Break, small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "broken")
    edit = Edit(tmp_path / "broken")
    function(edit)
    edit.save()
    result = check(tmp_path / "broken", silent=True)
    shown = json.dumps([finding.as_json() for finding in result.findings], indent=1)
    assert {finding.id for finding in result.findings} == expected, shown
    for finding in result.findings:
        assert finding.message
        assert finding.remedy
        assert "\n" not in finding.message + finding.remedy


def test_every_rule_has_a_case() -> None:
    covered = set().union(*(expected for _, expected, _ in CASES))
    assert covered | {"format-not-covered"} == {rule.id for rule in STATIC_RULES}  # that one has tests of its own
