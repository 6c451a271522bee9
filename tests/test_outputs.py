"""The bytes of outputs that are the same on every machine are those of outputs.json."""

import json
from pathlib import Path

from outputs import PINNED, pinned


def test_no_byte_of_the_pinned_outputs_has_changed(tmp_path: Path) -> None:
    found = pinned(tmp_path)
    assert len(found) > 50 and not [name for name in found if "refused" in name]
    assert found == json.loads(PINNED.read_text(encoding="utf-8")), "if it is meant: python tests/outputs.py --pin"
