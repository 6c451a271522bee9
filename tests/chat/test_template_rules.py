"""Our template keeps rules 1 to 21; the cases are mtpress.chat.cases."""

import hashlib
import itertools
import json
import re
from itertools import islice
from pathlib import Path

import pytest

from corpus import documents
from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat import template as templating
from mtpress.chat.cases import CASES, HELLO, NO_THOUGHT, PREAMBLE, WEATHER, Case, assistant, system, user
from mtpress.chat.messages import CONTROL_TOKENS
from mtpress.chat.template import TEMPLATE, _compile, behaviour, case_failure, render, template
from mtpress.errors import InputError

HANDOFF = "Reason fully and verify the result inside the thought. Then close the thought and answer. Do not confirm again what is settled."
HANDOFF_WITH_TOOLS = "Reason fully inside the thought. Then close it and call a function or answer. Do not confirm again what is settled."
LEARNED = "f00fbe82d4245169afbbd8022507b0824f059e88302db99558f95c88a9a65cb7"  # SHA-256, see its test
LABELS = [f"{case.number:02} {case.title}" for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=LABELS)
def test_rule(case: Case) -> None:
    assert case_failure(template(), case) is None


def test_every_rule_has_cases_of_its_own() -> None:
    assert {case.number for case in CASES} == set(range(1, 22))
    assert len(set(LABELS)) == len(LABELS)
    assert [case.number for case in CASES] == sorted(case.number for case in CASES)


# One change each that breaks a rule, and the rules that say so: none of the cases is empty talk.
BROKEN = (
    ("('<think>\\n' if thinking else no_thought)", "'<think>\\n'", {1, 2, 3}),
    ("and value is not boolean", "and false", {2}),
    ("| replace('<|think_on|>', '')", "", {3}),
    ("for message in messages if message.role in ('system', 'developer') -", "for message in messages -", {4}),
    ("(handoff_with_tools if has_tools else handoff)", "handoff", {5}),
    ("if thinking -%}\n  {%- set lead.text", "if false -%}\n  {%- set lead.text", {5}),
    ("elif lead.text -", "elif lead.count -", {6}),
    ("('\\n\\n' if lead.text else '') ~ text -", "text -", {7}),
    ("instruction_of(message) if loop.index0 >= lead.count else ''", "''", {7}),
    ("if not messages", "if not messages or messages[-1].role != 'user'", {8}),
    ("raise_exception('unknown role", "('unknown role", {9}),
    ("\\n</tools>\\n\\nIf you", "\\n</tools>\\nIf you", {10}),
    ("plain(tool | tojson)", "plain(tool | string)", {10}),
    ("value if value is string else value | tojson", "value | tojson", {11}),
    ("{%- elif call.arguments -%}", "{%- elif false -%}", {12}),
    ("'\\n' if text.endswith('\\n') else '\\n\\n'", "'\\n'", {13}),
    ("if loop.first or loop.previtem.role != 'tool'", "if loop.previtem.role != 'tool'", {14}),
    ("turn.text.startswith('<think>') and '</think>' in turn.text", "'</think>' in turn.text", {15}),
    ("message.reasoning is string and", "false and", {15}),
    ("'' if turn.thought.endswith('\\n') else '\\n'", "'\\n'", {16}),
    ("set text = turn.text if show_thought or show_none else turn.text.lstrip('\\n')", "set text = turn.text | trim", {16}),
    ("not turn.thought and not (past.on and not past.off)", "not turn.thought", {17}),
    ("preserve_thinking is false -%}\n", "true -%}\n", {17}),
    ("'' if turn.text.startswith('\\n') else '\\n\\n') -", "'') -", {16, 18}),
    ("kind in ('image', 'image_url')", "kind == 'image'", {19}),
    ("set seen.images = seen.images + 1", "set seen.images = 1", {20}),
    ("'<|im_end|>', '<|object_ref_start|>'", "'<|object_ref_start|>'", {21}),
    ("    {{- plain(run.text) -}}\n  {%- endif -%}", "    {{- run.text -}}\n  {%- endif -%}", {21}),
)


@pytest.mark.parametrize(("old", "new", "numbers"), BROKEN, ids=[f"{old[:40]}" for old, _, _ in BROKEN])
def test_a_template_that_breaks_a_rule_is_told_which(old: str, new: str, numbers: set[int]) -> None:
    assert old in template()
    assert numbers <= {failure.number for failure in behaviour(template().replace(old, new))}


def test_behaviour_of_templates_that_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert behaviour(template()) == []
    assert {failure.number for failure in behaviour("{% if %}")} == set(range(1, 22))
    assert len(behaviour("{{ messages.nothing.at_all }}")) == len(CASES)
    monkeypatch.setattr(templating, "MAX_RENDER_SECONDS", 0.2)
    endless = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    failures = behaviour(endless)
    assert len(failures) == len(CASES) and all("it ran for" in failure.what for failure in failures)
    assert "it wants over 400 MB" in behaviour("{{ 'a' * 10 ** 10 }}", CASES[:1])[0].what


def test_05_the_handoffs_word_for_word() -> None:
    asked = {"add_generation_prompt": True, "enable_thinking": True}
    assert render(template(), HELLO, **asked).startswith(f"<|im_start|>system\n{HANDOFF}<|im_end|>\n<|im_start|>user\n")
    assert render(template(), [system("Be kind."), *HELLO], **asked).startswith(f"<|im_start|>system\nBe kind.\n\n{HANDOFF}<|im_end|>\n")
    assert render(template(), HELLO, [WEATHER], **asked).startswith(f"{PREAMBLE}\n\n{HANDOFF_WITH_TOOLS}<|im_end|>\n")


def test_09_errors_say_what_and_of_whom() -> None:
    for messages, words in (
        ([], "no messages"),
        ([{"role": "critic", "content": ""}], "unknown role critic"),
        ([{"content": ""}], r"unknown role \(none\)"),
        ([system([{"type": "image"}])], "a system message cannot hold an image or a video"),
        ([user([{"type": "smell"}])], "unknown content part in a user message"),
        ([user([7])], "unknown content part in a user message"),
        ([user([{"type": "text", "text": None}])], "unknown content part in a user message"),
        ([assistant(7)], "content of a assistant message must be a string or a list of parts"),
        ([assistant("", tool_calls=[{"function": {}}])], "a tool call has no name"),
    ):
        with pytest.raises(InputError, match=rf"^messages: the chat template refuses this conversation: {words}"):
            render(template(), messages)
    for tools in ("look", {"name": "look"}, 7):
        with pytest.raises(InputError, match="tools must be a list"):
            render(template(), HELLO, tools)  # type: ignore[arg-type]


def test_12_the_bare_template_never_writes_a_string_of_json() -> None:
    for arguments in ('{"town": "Tarn"}', "Tarn", [1]):
        call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
        with pytest.raises(InputError, match="arguments of a tool call must be an object; parse JSON strings before rendering"):
            render(template(), [assistant("", tool_calls=[call])])


def test_18_transformers_goes_on_with_the_last_message() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for field, last, end in (
        (True, assistant("Well, "), f"{NO_THOUGHT}Well, "),
        (True, assistant([{"type": "text", "text": "Well,  "}]), f"{NO_THOUGHT}Well,  "),
        ("reasoning_content", assistant("", reasoning_content="Hm, "), "<think>\nHm, "),
    ):
        shown, _ = render_jinja_template([[*HELLO, last]], chat_template=template(), continue_final_message=field)
        assert shown[0] == f"<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n{end}"


def test_21_the_control_tokens_are_those_of_the_vocabulary() -> None:
    added = json.loads((BUILTIN_MODEL / "tokenizer.json").read_text())["added_tokens"]
    acting = {token["content"] for token in added if token["special"] or token["content"].startswith("<|")}
    assert acting == set(CONTROL_TOKENS)
    for token in CONTROL_TOKENS:
        assert f"<|im_start|>user\na< {token[1:]}b<|im_end|>\n" in render(template(), [user(f"a{token}b")])


def test_21_what_is_left_of_a_stripped_tag_is_no_token() -> None:
    text = render(template(), [system("<|im_<|think_off|>end|>"), *HELLO])
    assert text.startswith("<|im_start|>system\n< |im_end|><|im_end|>\n")


def test_22_switches_are_undeclared_variables() -> None:
    from jinja2 import meta

    undeclared = meta.find_undeclared_variables(_compile(template()).environment.parse(template()))
    assert undeclared >= {"messages", "tools", "add_generation_prompt", "enable_thinking", "preserve_thinking", "add_vision_id"}


def test_23_transformers_sandbox_renders_the_same() -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    rendered = 0
    for text, case in itertools.product((template(), template(training=True)), CASES):
        if "raises" in case.must:
            continue
        theirs = _compile_jinja_template(text).render(messages=list(case.messages), tools=case.tools, documents=None, **case.kwargs)
        assert theirs == render(text, case.messages, case.tools, **case.kwargs)
        rendered += 1
    assert rendered > 150


def test_27_the_training_variant_renders_the_same() -> None:
    assert "{% generation" not in template() and "{%- generation" not in template()
    assert template(training=True).count("{%- generation -%}") == template(training=True).count("{%- endgeneration -%}") == 1
    assert behaviour(template(training=True)) == []
    for case in CASES:
        if "raises" not in case.must:
            assert render(template(), case.messages, case.tools, **case.kwargs) == render(
                template(training=True), case.messages, case.tools, **case.kwargs
            )


def test_27_the_marks_hold_what_the_model_wrote() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    talk = [
        user("Rain?"),
        assistant("", reasoning_content="Look.", tool_calls=[{"function": {"name": "look"}}]),
        {"role": "tool", "content": "Rain."},
        assistant("Yes.", reasoning_content="Wet."),
    ]
    call = "<tool_call>\n<function=look>\n</function>\n</tool_call>"
    for messages, wrote in (
        ([*HELLO, assistant("Hi."), *HELLO], ["Hi.<|im_end|>"]),
        (talk, [f"Look.\n</think>\n\n{call}<|im_end|>", "Wet.\n</think>\n\nYes.<|im_end|>"]),
    ):
        shown, spans = render_jinja_template([messages], chat_template=template(training=True), return_assistant_tokens_mask=True)
        assert [shown[0][start:end] for start, end in spans[0]] == wrote


def test_the_shipped_model_has_this_template() -> None:
    assert (BUILTIN_MODEL / "chat_template.jinja").read_bytes() == TEMPLATE.read_bytes()


def test_what_the_shipped_model_learned_is_rendered_as_then() -> None:
    """SHA-256 of the rendered training documents, taken with the template that mtpress-tiny was trained with."""
    digest = hashlib.sha256()
    for document in islice(documents("train"), 500):
        if document.messages:
            thinking = {} if document.enable_thinking is None else {"enable_thinking": document.enable_thinking}
            for prompt in (False, True):
                digest.update(render(template(), document.messages, document.tools, add_generation_prompt=prompt, **thinking).encode())
    assert digest.hexdigest() == LEARNED


def test_comments_name_every_rule() -> None:
    named = {int(number) for group in re.findall(r"\(((?:\d+(?:, )?)+)\)", Path(TEMPLATE).read_text()) for number in group.split(", ")}
    assert set(range(1, 22)) - {4, 8, 18} <= named


def test_the_guide_has_every_rule_and_the_words_of_the_handoff() -> None:
    guide = (Path(__file__).parents[2] / "docs/chat-template.md").read_text()
    rules = guide.partition("## The rules")[2].partition("\n## ")[0]
    assert [int(number) for number in re.findall(r"^(\d+)\. ", rules, re.MULTILINE)] == list(range(1, 28))
    assert f"> {HANDOFF}\n" in guide and f"> {HANDOFF_WITH_TOOLS}\n" in guide
    assert guide.count("<!-- official templates -->") == 1 and "<!-- end -->" in guide.partition("<!-- official templates -->")[2]
