"""What the rules say of a chat template: where they find it, and which numbers they name."""

import json
import shutil
from pathlib import Path

import pytest

from mtpress.chat.template import template
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.quant_config.tokenizer_files import SPECIALS
from mtpress.quant_config.view import Subject
from mtpress.rules import template as rules
from mtpress.rules.rule import Finding, apply
from mtpress.rules.tokenizer import special_tokens

TRIMS = ("set text = turn.text if show_thought or show_none else turn.text.lstrip('\\n')", "set text = turn.text | trim")
TYPED = ("'<|im_end|>', '<|object_ref_start|>'", "'<|object_ref_start|>'")
NO_HANDOFF = ("if thinking -%}\n  {%- set lead.text", "if false -%}\n  {%- set lead.text")


def changed(*changes: tuple[str, str]) -> str:
    text = template()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


@pytest.fixture
def made(small_bf16: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_bf16, tmp_path / "made"))


def findings(made: Path) -> dict[str, Finding]:
    return {finding.id: finding for finding in apply(rules.RULES, Subject(Checkpoint.open(made)))}


def test_the_numbers_that_fail_are_named_each_once(made: Path) -> None:
    (made / "chat_template.jinja").write_text(changed(TRIMS, TYPED, NO_HANDOFF))
    found = findings(made)
    assert found.keys() == {"template-behaviour", "template-choices"}
    assert "does not keep 3 rules of docs/chat-template.md: 15 (" in found["template-behaviour"].message
    assert "; 16 (" in found["template-behaviour"].message
    assert found["template-behaviour"].message.endswith("; 21 (control tokens typed by a user)")
    assert found["template-choices"].message.endswith(
        "decides otherwise in 1 rule of docs/chat-template.md: 5 (handoff without a system message)"
    )
    assert found["template-behaviour"].where == ("chat_template.jinja",)


@pytest.mark.parametrize("named", [False, True])
def test_a_template_is_found_where_engines_look(named: bool, made: Path) -> None:
    (made / "chat_template.jinja").unlink()
    text = changed(TRIMS)
    inside = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": text}] if named else text
    path = made / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": inside}))
    assert findings(made)["template-behaviour"].where == ("tokenizer_config.json",)
    (made / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert findings(made)["template-behaviour"].where == ("chat_template.json",)
    (made / "chat_template.jinja").write_text(template() + "\n")
    assert findings(made).keys() == {"template-twice"}


def test_a_lost_part_says_which(made: Path) -> None:
    (made / "chat_template.jinja").write_text(changed(("plain(tool | tojson)", "''")))
    found = findings(made)
    assert found.keys() == {"template-loses"}
    assert found["template-loses"].severity == "error"
    assert "fails in 1 part of a plain conversation: a tool (" in found["template-loses"].message


def test_special_tokens_at_other_places_are_named(made: Path) -> None:
    """A tokenizer whose </think> and <|im_end|> were swapped, and which lacks <tool_call>; sound and speech may be absent."""
    ids = {token: 248_044 + number for number, token in enumerate(SPECIALS[:26])}
    path = made / "tokenizer.json"
    content = json.loads(path.read_text())

    def said(ids: dict[str, int]) -> list[str]:
        path.write_text(json.dumps(content | {"added_tokens": [{"content": token, "id": number} for token, number in ids.items()]}))
        return [problem.message for problem in special_tokens(Subject(Checkpoint.open(made)))]

    assert said(ids) == []
    ids["</think>"], ids["<|im_end|>"] = ids["<|im_end|>"], ids["</think>"]
    del ids["<tool_call>"]
    (message,) = said(ids)
    assert message.startswith("3 special tokens not where the family has them: ")
    for part in ("<|im_end|> at 248069, not 248046", "</think> at 248046, not 248069", "no <tool_call>, which has 248058"):
        assert part in message
