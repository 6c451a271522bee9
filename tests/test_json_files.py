"""JSON that every reader takes."""

import json
from typing import Any

import pytest

from mtpress.checkpoint.record import record_bytes
from mtpress.json_files import json_bytes, json_string
from mtpress.terminal import json_text

NAN, INFINITE = float("nan"), float("inf")


def strict(text: str | bytes) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


def test_what_is_no_number_is_null() -> None:
    content = {"a": NAN, "b": [1.5, -INFINITE, (NAN, "NaN")], "c": {"d": INFINITE, "e": None}, 3: True}
    expected = {"a": None, "b": [1.5, None, [None, "NaN"]], "c": {"d": None, "e": None}, "3": True}
    assert strict(json_string(content)) == strict(json_bytes(content)) == strict(json_text(content)) == expected


def test_a_record_has_no_nan() -> None:
    assert strict(record_bytes("eval", kl=NAN))["kl"] is None


def test_numbers_are_written_as_ever() -> None:
    content = {"figures": [0.1, 1e-300, 12, -0.0], "name": "é"}
    assert json_bytes(content) == (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
