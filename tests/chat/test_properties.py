"""What holds for any conversation: prefixes (16), no error where nothing is wrong, a named one where something is."""

from typing import Any

import pytest
from conversations import completions, conversations, hostile_text, switches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtpress.chat.cases import Continuation, Message, user
from mtpress.chat.messages import CONTROL_TOKENS, normalize_messages
from mtpress.chat.template import _compile, render, template
from mtpress.errors import InputError

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@pytest.mark.parametrize("hands_on", ["raw", "stripped"])
@pytest.mark.parametrize("thinking", [False, True], ids=["instruct", "thinking"])
@quick
@given(data=st.data())
def test_16_the_next_prompt_begins_with_this_one(thinking: bool, hands_on: str, data: st.DataObject) -> None:
    """A conversation of three completions, tool loops among them; each prompt begins with the last one and what was written."""
    asked: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": thinking}
    tools = data.draw(st.sampled_from((None, [{"type": "function", "function": {"name": "look"}}])))
    messages: list[Message] = [
        *data.draw(st.sampled_from(([], [{"role": "system", "content": " Be kind.\n"}]))),
        user(data.draw(hostile_text)),
    ]
    for _ in range(3):
        before = render(template(), messages, tools, **asked)
        growth: Continuation = data.draw(completions(thinking, hands_on))
        messages += [growth.message, *growth.then]
        assert render(template(), messages, tools, **asked).startswith(before + growth.completion)
        if messages[-1]["role"] in ("assistant", "system"):
            messages.append(user("Go on."))


@quick
@given(conversations, switches)
def test_valid_conversations_render(messages: list[Message], asked: dict[str, Any]) -> None:
    """As they are and normalised, in both variants, with as many turns and pictures as were given and no token that was typed."""
    text = render(template(), messages, **asked)
    assert render(template(training=True), messages, **asked) == text
    normal = normalize_messages(messages)
    assert normalize_messages(normal) == normal
    assert render(template(), normal, **asked) == text
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    for kind in ("image", "video"):
        assert text.count(f"<|{kind}_pad|>") == sum(any(part.get(key) for key in (kind, f"{kind}_url")) for part in parts)
    ends = text.count("<|im_end|>")
    assert text.count("<|im_start|>") == ends + bool(asked.get("add_generation_prompt"))
    assert not any(token in text for token in CONTROL_TOKENS if token.startswith(("<|fim", "<|endoftext", "<tts", "<|audio", "<|box")))


INVALID_PARTS = (7, {}, {"type": "smell"}, {"type": "text"}, {"type": "text", "text": 1}, {"text": None})
INVALID_CALLS = (None, 7, {}, {"function": None}, {"function": {"name": ""}}, {"function": {"name": "look", "arguments": 7}})


@st.composite
def spoilt(draw: st.DrawFn) -> tuple[list[Any], int, str]:
    """A conversation with one thing wrong, the number of its message, and the field."""
    messages: list[Any] = draw(conversations)
    at = draw(st.integers(0, len(messages)))
    role = draw(st.sampled_from(("user", "assistant")))
    wrong, field = draw(
        st.one_of(
            st.sampled_from((None, "critic", 7, "")).map(lambda r: ({"role": r, "content": "Hm."}, "role")),
            st.sampled_from((7, {"type": "text", "text": "Hm."}, 1.5, True)).map(lambda c: ({"role": role, "content": c}, "content")),
            st.sampled_from(INVALID_PARTS).map(lambda p: ({"role": role, "content": ["Hm.", p]}, "content[1]")),
            st.sampled_from(("image", "video")).map(lambda k: ({"role": "system", "content": [{"type": k}]}, "content[0]")),
            st.sampled_from(INVALID_CALLS).map(lambda c: ({"role": "assistant", "content": "", "tool_calls": [c]}, "tool_calls[0]")),
            st.sampled_from(("{", "[1]", "7", '"a"', "Tarn", "[" * 100_000)).map(
                lambda a: ({"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": a}}]}, "tool_calls[0].arguments")
            ),
        )
    )
    return [*messages[:at], wrong, *messages[at:]], at + 1, field


@quick
@given(spoilt())
def test_invalid_conversations_are_refused_by_name(case: tuple[list[Any], int, str]) -> None:
    messages, number, field = case
    with pytest.raises(InputError) as raised:
        normalize_messages(messages, where="line 3")
    assert str(raised.value).startswith(f"line 3: message {number}: {field}")
    with pytest.raises(InputError, match=r"^messages: the chat template refuses this conversation: \S+ \S+"):
        render(template(), messages)


@given(st.sampled_from((None, [], (), "Hello!", {}, 7)))
def test_no_conversation_at_all(messages: Any) -> None:
    with pytest.raises(InputError, match=r"^messages: no messages"):
        normalize_messages(messages)


def test_the_strategies_reach_what_they_are_for() -> None:
    """Errors of the template itself are TemplateErrors of its own, for every kind of spoilt conversation."""
    from jinja2 import TemplateError, TemplateRuntimeError

    fields = set()

    @settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @given(spoilt())
    def look(case: tuple[list[Any], int, str]) -> None:
        fields.add(case[2])
        with pytest.raises(TemplateError) as raised:
            _compile(template()).render(messages=case[0])
        assert not isinstance(raised.value, TemplateRuntimeError)

    look()
    assert fields == {"role", "content", "content[1]", "content[0]", "tool_calls[0]", "tool_calls[0].arguments"}
