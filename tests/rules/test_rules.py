"""Every rule fires on a checkpoint that is broken in its way, and no other rule does."""

import json
import shutil
from pathlib import Path

import pytest

import format_breaks
from breaks import CASES, Break
from checkpoints import SMALL_FORMATS, Edit
from mtpress.rules.registry import STATIC_RULES
from mtpress.stages.check import check


@pytest.mark.parametrize(("expected", "function"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_checkpoint(expected: set[str], function: Break, small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    fires(expected, function, small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "broken")


@pytest.mark.parametrize(
    ("kind", "expected", "function"), [case[1:] for case in format_breaks.CASES], ids=[c[0] for c in format_breaks.CASES]
)
def test_a_broken_checkpoint_of_another_format(
    kind: str, expected: set[str], function: Break, small_formats: dict[str, Path], tmp_path: Path
) -> None:
    fires(expected, function, small_formats[kind], tmp_path / "broken")


@pytest.mark.parametrize("kind", SMALL_FORMATS)
def test_a_sound_checkpoint_of_each_format(kind: str, small_formats: dict[str, Path]) -> None:
    result = check(small_formats[kind], silent=True)
    assert result.findings == ()
    assert result.num_quantized == 25


def fires(expected: set[str], function: Break, sound: Path, broken: Path) -> None:
    """Breaks a copy, and asks check."""
    edit = Edit(Path(shutil.copytree(sound, broken)))
    function(edit)
    edit.save()
    result = check(broken, silent=True)
    shown = json.dumps([finding.as_json() for finding in result.findings], indent=1)
    assert {finding.id for finding in result.findings} == expected, shown
    for finding in result.findings:
        assert finding.message
        assert finding.remedy
        assert "\n" not in finding.message + finding.remedy


def test_every_rule_has_a_case() -> None:
    covered = set().union(*(expected for _, expected, _ in CASES), *(expected for _, _, expected, _ in format_breaks.CASES))
    assert covered == {rule.id for rule in STATIC_RULES}
