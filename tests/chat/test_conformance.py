"""Templates of strangers: what is lost, what fails, and what a hostile one costs."""

import pytest

from mtpress.chat import conformance as template_trial
from mtpress.chat.cases import CASES
from mtpress.chat.conformance import NO_TEXT, NO_TURN, Trial, judged, plain_conversation, tried
from mtpress.chat.template import behaviour, template

QUIET = "{{ 'x' * 10 }}"


@pytest.fixture(autouse=True)
def anew() -> None:
    tried.cache_clear()


def test_ours_loses_nothing_and_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(template(), True, {}) == ([], [])
    monkeypatch.setattr(template_trial, "_process", None)
    assert tried(template()) == Trial()


def test_the_trial_is_the_behaviour_in_another_process() -> None:
    changed = template().replace("plain(tool | tojson)", "plain(tool | string)") + "{# another #}"
    found = tried(changed)
    assert found.lost == ()
    assert list(found.failures) == behaviour(changed)
    assert {failure.number for failure in found.failures} == {10}


def test_a_model_without_a_tower_needs_no_pictures() -> None:
    blind = template().replace("kind in ('image', 'image_url')", "false")
    assert [failure.title for failure in tried(blind).lost] == ["a picture"]
    assert tried(blind, pictures=False) == Trial()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{{ 'a' * 10 ** 10 }}", "it wants over 400 MB"),
        ("{% if %}", "raises TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "raises SecurityError"),
        ("{% macro more() %}{{ more() }}{% endmacro %}{{ more() }}", "raises RecursionError"),
        ("x" * 1_000_001, "characters, over 1,000,000"),
        (QUIET, "is missing"),
        ("{{ raise_exception('\ud800') }}", "raises"),
    ],
)
def test_a_template_that_does_not_work(text: str, what: str) -> None:
    found = tried(text)
    assert what in found.lost[0].what
    assert found.failures == ()


def test_one_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """In C, where no clock of Python's reaches it, too."""
    monkeypatch.setattr(template_trial, "MAX_SECONDS", 1.0)
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for text in (loops, "{{ 7 ** (10 ** 10) }}"):
        assert [failure.what for failure in tried(text).lost] == ["rendering takes over 1 s; look for a loop without end in it"]


def test_each_part_of_the_plain_conversation_can_be_lost() -> None:
    """Taken out of ours one at a time."""
    words = ("Hello!", "Be kind.", "get_weather", "Tarn", "I look it up.", "Drizzle", "Good morning.", "<|image_pad|>")
    for word, case in zip(words, [case for case in plain_conversation() if case.title != NO_TURN], strict=True):
        assert case.title in {failure.title for failure in behaviour(without(word), plain_conversation())}
    assert {case.number for case in plain_conversation()} <= {case.number for case in CASES}


def test_what_a_template_may_leave_out_does_not_break_it() -> None:
    """A turn for the answer, and the text before a call."""
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.tool_calls if m.tool_calls else m.content }}<|im_end|>\n{% endfor %}"
    found = tried("{{ tools }}" + turns, False)
    assert [failure.title for failure in found.lost] == [NO_TURN, NO_TEXT]
    assert found.cripples == ()


def test_the_tokenizers_own_marks_are_told() -> None:
    ended = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    assert tried(ended, False).cripples != ()
    assert tried(ended, False, (("eos_token", "</s>"),)).cripples == ()


def without(word: str) -> str:
    """Ours, with a word taken out of everything it writes."""
    return "{% set whole %}" + template() + "{% endset %}{{ whole | replace('" + word + "', '') }}"
