"""The reasoning parser and vLLM's qwen3_xml on what our template renders, in vLLM's own classes: one process, no engine.

Numbers are the rules of docs/chat-template.md. Prompts are rendered by the template, answers are what a model writes behind them.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtpress.chat.cases import CASES
from mtpress.chat.template import render, template
from mtpress.engine.launch.settings import REASONING_PARSER

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("parse_answers.py")
BUILTIN_MODEL = Path(__file__).parents[2] / "src/mtpress/builtin/mtpress-tiny"
OURS = template()
Ask = Callable[..., Any]
ON, OFF = "<|think_on|>", "<|think_off|>"
USER = {"role": "user", "content": "What is 2 + 2?"}
THOUGHT, ANSWER = "Two and two.\n", "\n\nIt is 4."
CALL = "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n</tool_call>"
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
STEPS = ([1], [2, 1, 5], [1000])  # tokens a step: one, as drafts are accepted, all at once


@pytest.fixture(scope="module")
def ask(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """ask(what, …): a function of parse_answers.py, in the engine's python."""
    log = tmp_path_factory.mktemp("parsers") / "log"
    command = [str(engine_python), str(SCRIPT), str(BUILTIN_MODEL)]
    with log.open("w") as file, subprocess.Popen(command, stdin=-1, stdout=-1, stderr=file, text=True, bufsize=1) as running:
        assert running.stdin is not None and running.stdout is not None

        def asked(what: str, **about: Any) -> Any:
            running.stdin.write(json.dumps({"do": what, **about}) + "\n")
            line = running.stdout.readline()
            assert line, log.read_text()[-3000:]
            return json.loads(line)["answer"]

        yield asked
        running.kill()  # its imports take seconds to be taken down


def request(messages: list[dict[str, Any]], tools: bool = False, **more: Any) -> dict[str, Any]:
    return {"messages": messages, **({"tools": [ADD]} if tools else {}), **more}


def prompt_of(asked: dict[str, Any], defaults: dict[str, Any] | None = None) -> str:
    """What our template makes of a request."""
    kwargs = {**(defaults or {}), **asked.get("chat_template_kwargs", {})}
    return render(OURS, asked["messages"], asked.get("tools"), add_generation_prompt=True, **kwargs)


# --- (26) where reasoning and content land


def system(*texts: str) -> list[dict[str, Any]]:
    return [*({"role": "system", "content": text} for text in texts), USER]


MODES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], bool]] = {
    "no kwarg": ([USER], {}, False),
    "false": ([USER], {"enable_thinking": False}, False),
    "true": ([USER], {"enable_thinking": True}, True),
    "on-tag": (system(f"Be kind. {ON}"), {}, True),
    "off-tag": (system(OFF), {}, False),
    "on-tag and false": (system(ON), {"enable_thinking": False}, False),
    "off-tag and true": (system(OFF), {"enable_thinking": True}, False),
    "both tags": (system(f"{ON}{OFF}"), {}, False),
    "developer's tag": ([{"role": "developer", "content": ON}, USER], {}, True),
    "late tag": ([USER, {"role": "assistant", "content": "4"}, *system(ON)], {}, True),
    "tag in a part": ([{"role": "system", "content": [{"type": "text", "text": ON}]}, USER], {}, True),
    "user's tag": ([{"role": "user", "content": ON}], {}, False),
    "user's off-tag": ([{"role": "user", "content": OFF}], {"enable_thinking": True}, True),
    "none": ([USER], {"enable_thinking": None}, False),
}


@pytest.mark.parametrize("shown", [True, False], ids=["prompt shown", "by the request"])
@pytest.mark.parametrize("tools", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("mode", list(MODES))
def test_26_the_mode_of_a_whole_answer(ask: Ask, mode: str, tools: bool, shown: bool) -> None:
    messages, kwargs, thinks = MODES[mode]
    asked = request(messages, tools, chat_template_kwargs=kwargs)
    prompt = prompt_of(asked)
    assert prompt.endswith("<think>\n" if thinks else "<think>\n\n</think>\n\n")
    text = (f"{THOUGHT}</think>" if thinks else "") + ANSWER
    found = ask("parse", request=asked, text=text, **({"prompt": prompt} if shown else {}))
    assert (found["reasoning"], found["content"], found["calls"]) == (THOUGHT if thinks else None, ANSWER, [])
    assert (0 < found["reasoning_tokens"] < found["tokens"]) == thinks


@pytest.mark.parametrize("steps", STEPS, ids=str)
@pytest.mark.parametrize("tools", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("mode", list(MODES))
def test_26_the_mode_of_a_stream(ask: Ask, mode: str, tools: bool, steps: list[int]) -> None:
    messages, kwargs, thinks = MODES[mode]
    asked = request(messages, tools, chat_template_kwargs=kwargs)
    text = (f"{THOUGHT}</think>" if thinks else "") + ANSWER
    found = ask("parse", request=asked, text=text, prompt=prompt_of(asked), lengths=steps)
    assert (found["reasoning"], found["content"], found["calls"]) == (THOUGHT if thinks else None, ANSWER, [])


@pytest.mark.parametrize("steps", [None, *STEPS], ids=str)
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "not closed"])
def test_26_a_call_behind_a_thought(ask: Ask, steps: list[int] | None, closed: bool) -> None:
    asked = request([USER], True, chat_template_kwargs={"enable_thinking": True})
    text = f"{THOUGHT}{'</think>' if closed else ''}\n\n{CALL}"
    found = ask("parse", request=asked, text=text, prompt=prompt_of(asked), lengths=steps)
    assert found["calls"] == [{"name": "add", "arguments": '{"a": 2}'}]
    assert (found["reasoning"], (found["content"] or "").strip()) == (THOUGHT + ("" if closed else "\n\n"), "")


@pytest.mark.parametrize("steps", [None, *STEPS], ids=str)
def test_26_a_thought_that_has_no_end_is_reasoning(ask: Ask, steps: list[int] | None) -> None:
    asked = request([USER], chat_template_kwargs={"enable_thinking": True})
    found = ask("parse", request=asked, text="Two and </thi", prompt=prompt_of(asked), lengths=steps)
    assert (found["reasoning"], found["content"], found["reasoning_tokens"]) == ("Two and </thi", None, found["tokens"])


def test_26_the_servers_default_reaches_template_and_parser_alike(ask: Ask) -> None:
    """vLLM merges it into the kwargs of both; an off-tag still beats it."""
    for messages, thinks in (([USER], True), (system(OFF), False)):
        asked = request(messages, chat_template_kwargs={"enable_thinking": True})
        found = ask("parse", request=asked, text=f"{THOUGHT}</think>{ANSWER}" if thinks else ANSWER)
        assert (found["reasoning"], found["content"]) == (THOUGHT if thinks else None, ANSWER)
        assert prompt_of(request(messages), {"enable_thinking": True}).endswith("<think>\n") == thinks


@given(
    st.lists(
        st.tuples(st.sampled_from(["system", "developer", "user", "assistant"]), st.sampled_from(["Hello.", ON, OFF, f"a {ON}"])),
        min_size=1, max_size=5,
    ),
    st.sampled_from([True, False, None]),
)  # fmt: skip
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_26_prompt_and_request_say_the_same(ask: Ask, said: list[tuple[str, str]], asked_for: bool | None) -> None:
    """A parser that sees the prompt and one that sees the request decide alike, whatever the conversation."""
    messages = [{"role": role, "content": text} for role, text in said]
    asked = request(messages, chat_template_kwargs={} if asked_for is None else {"enable_thinking": asked_for})
    prompt = prompt_of(asked)
    by_prompt, by_request = (ask("parse", request=asked, text=ANSWER, **shown) for shown in ({"prompt": prompt}, {}))
    assert by_prompt == by_request
    assert (by_prompt["content"] is None) == prompt.endswith("<think>\n")


def test_26_the_responses_api_shows_no_prompt(ask: Ask) -> None:
    parts = [{"type": "input_text", "text": f"Be kind. {ON}"}]
    for body, thinks in (
        ({"input": "Hi"}, False),
        ({"input": "Hi", "instructions": ON}, True),
        ({"input": [{"role": "developer", "content": parts}, {"role": "user", "content": "Hi"}]}, True),
        ({"input": [{"role": "user", "content": ON}]}, False),
    ):
        found = ask("parse", request=body, text=f"{THOUGHT}</think>{ANSWER}" if thinks else ANSWER)
        assert (found["reasoning"], found["content"]) == (THOUGHT if thinks else None, ANSWER), body


def test_18_26_a_turn_that_goes_on(ask: Ask) -> None:
    """What a continued turn holds decides: an open thought, a closed one, or words of the answer."""
    for begun, thinks in ((f"<think>\n{THOUGHT}", True), (f"<think>\n{THOUGHT}</think>\n\nIt", False), ("It", False)):
        messages = [*system(ON), {"role": "assistant", "content": begun}]
        asked = request(messages, continue_final_message=True, add_generation_prompt=False)
        prompt = render(OURS, messages).removesuffix("<|im_end|>\n")
        for shown in ({"prompt": prompt}, {}):
            found = ask("parse", request=asked, text="So.</think>\n\nIt is." if thinks else " is 4.", **shown)
            assert (found["reasoning"], found["content"]) == (("So.", "\n\nIt is.") if thinks else (None, " is 4.")), (begun, shown)


def test_26_what_structured_outputs_ask(ask: Ask) -> None:
    """A grammar begins where the thought ends: in the prompt, behind it, or never where none was begun."""
    turn = "<|im_start|>assistant\n"
    for text, kwargs, ended in (
        (f"{turn}<think>\n\n</think>\n\n", {}, True),
        (f"{turn}<think>\n", {}, False),
        (f"{turn}<think>\n{THOUGHT}</think>\n\n", {}, True),
        (f"{turn}<think>\n{THOUGHT}</think>\n\n<|im_end|>\n{turn}<think>\n", {"enable_thinking": True}, False),
        (f"{turn}It", {"enable_thinking": True}, True),
        (THOUGHT, {"enable_thinking": True}, False),
        (f"{THOUGHT}</think>", {"enable_thinking": True}, True),
        (ANSWER, {}, True),
    ):
        assert ask("reasoning_end", text=text, kwargs=kwargs) == ended, text
    assert ask("marks") == ["<think>", "</think>"]  # thinking_token_budget counts between these


def test_vllms_own_parser_leaves_content_null(ask: Ask) -> None:
    """vllm#53284. Once this fails, vLLM looks at the prompt of whole answers, and the plugin may go."""
    asked = request([USER])
    found = ask("parse", parser="qwen3", request=asked, text="It is 4.", prompt=prompt_of(asked))
    assert (found["reasoning"], found["content"]) == ("It is 4.", None)


# --- (24) arguments of calls come back as they went


def tool(schema: dict[str, Any] | None, name: str = "act", argument: str = "value") -> dict[str, Any]:
    properties = {} if schema is None else {argument: schema}
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def returned(ask: Ask, arguments: dict[str, Any], offered: dict[str, Any], steps: list[int] | None, text: str = "") -> Any:
    """What the parsers make of a call as our template renders it: its arguments; None where there is not that one call."""
    name = offered["function"]["name"]
    message = {"role": "assistant", "content": text, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
    prompt, whole = render(OURS, [USER], [offered], add_generation_prompt=True), render(OURS, [USER, message], [offered])
    assert whole.startswith(prompt)
    written = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
    found = ask("parse", request=request([USER]) | {"tools": [offered]}, text=written, prompt=prompt, lengths=steps)
    calls = found["calls"]
    if len(calls) != 1 or calls[0]["name"] != name or (found["content"] or "").strip() != text:
        return None
    try:
        return json.loads(calls[0]["arguments"])
    except ValueError:
        return None


STRING, NULLABLE = {"type": "string"}, {"type": ["string", "null"]}
VALUES: dict[str, tuple[dict[str, Any] | None, Any]] = {
    "string": (STRING, "Umber"), "empty": (STRING, ""), "blank": (STRING, " "), "a line end": (STRING, "\n"),
    "lines": (STRING, "a\n\n  b\n"), "leading line ends": (STRING, "\n\na"), "trailing line ends": (STRING, "a\n\n"),
    "CRLF": (STRING, "a\r\nb\r\n"), "tabs": (STRING, "\tdef f():\n\t\tpass"), "quotes": (STRING, '"\\n" \\'),
    "markup": (STRING, "<div class='a'>&lt;</div>"), "</think>": (STRING, "a </think> b"), "<think>": (STRING, "<think>\nb\n</think>"),
    "</tool_call>": (STRING, "a </tool_call> b"), "<tool_call>": (STRING, "<tool_call>\n"), "unicode": (STRING, "Zoë 東京 😀 e\u0301"),
    "digits": (STRING, "75001"), "words of JSON": (STRING, "true"), '"null"': (STRING, "null"), "JSON in a string": (STRING, '{"a": 1}'),
    "without a schema": (None, "Umber"), "integer": ({"type": "integer"}, -7), "large": ({"type": "integer"}, 2**70),
    "number": ({"type": "number"}, 1.5), "whole number": ({"type": "number"}, 3), "tiny number": ({"type": "number"}, 1e-9),
    "true": ({"type": "boolean"}, True), "false": ({"type": "boolean"}, False), "null": ({"type": "null"}, None),
    "null for a nullable string": (NULLABLE, None), "a nullable string": (NULLABLE, "Umber"),
    "array": ({"type": "array", "items": STRING}, ["a", "", "</think>", "é\n"]), "empty array": ({"type": "array"}, []),
    "mixed array": ({"type": "array"}, [1, "1", None, [True], {"a": 1.5}]), "empty object": ({"type": "object"}, {}),
    "object": ({"type": "object", "properties": {"a": STRING}}, {"a": "75001", "b": [None, {"c": "<div>"}], "d": "\n"}),
    "enumeration": ({"type": "string", "enum": ["a", "b"]}, "b"), "integer in a union": ({"type": ["integer", "string"]}, 7),
    "string in a union": ({"anyOf": [STRING, {"type": "integer"}]}, "seven"),
}  # fmt: skip
# The format has no escape: what is documented as impossible (docs/chat-template.md). One that comes back is news, and fails here.
IMPOSSIBLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "</parameter>": ({"value": "a </parameter> b"}, tool(STRING)),
    "</function>": ({"value": "a </function> b"}, tool(STRING)),
    "<parameter=": ({"value": "a <parameter=b> c"}, tool(STRING)),
    "a name with >": ({"a>b": "c"}, tool(STRING, argument="a>b")),
    "a function's name with >": ({"value": "c"}, tool(STRING, name="a>b")),
    '"null" for a nullable string': ({"value": "null"}, tool(NULLABLE)),
    "digits in a union": ({"value": "75001"}, tool({"type": ["string", "integer"]})),
    "control tokens (21)": ({"value": "a <|im_end|> b"}, tool(STRING)),
}


@pytest.mark.parametrize("steps", [None, *STEPS], ids=str)
@pytest.mark.parametrize("name", list(VALUES))
def test_24_a_value_comes_back(ask: Ask, name: str, steps: list[int] | None) -> None:
    schema, value = VALUES[name]
    found = returned(ask, {"value": value}, tool(schema), steps)
    assert found == {"value": value}
    assert type(found["value"]) is type(value)


@pytest.mark.parametrize("steps", [None, *STEPS], ids=str)
@pytest.mark.parametrize("name", list(IMPOSSIBLE))
def test_24_what_the_format_cannot_say(ask: Ask, name: str, steps: list[int] | None) -> None:
    arguments, offered = IMPOSSIBLE[name]
    assert returned(ask, arguments, offered, steps) != arguments


@pytest.mark.parametrize("steps", [None, *STEPS], ids=str)
def test_24_no_arguments_several_and_several_calls(ask: Ask, steps: list[int] | None) -> None:
    assert returned(ask, {}, tool(None), steps, "I act.") == {}
    assert returned(ask, {"a": "x", "zoë b": "y\n"}, tool(None), steps) == {"a": "x", "zoë b": "y\n"}
    calls = [{"function": {"name": "add", "arguments": {"a": number}}} for number in (1, 2, 3)]
    prompt = render(OURS, [USER], [ADD], add_generation_prompt=True)
    written = render(OURS, [USER, {"role": "assistant", "content": "", "tool_calls": calls}], [ADD]).removeprefix(prompt)
    found = ask("parse", request=request([USER], True), text=written.removesuffix("<|im_end|>\n"), prompt=prompt, lengths=steps)
    assert found["calls"] == [{"name": "add", "arguments": json.dumps({"a": number})} for number in (1, 2, 3)]
    assert not (found["content"] or "").strip()


PIECES = ["a", "Zoë", "東京", "😀", "\n", "\r\n", " ", "\t", "<", ">", "</", "<div>", "</think>", "<think>", "</tool_call>", "<tool_call>",
          "<param", "function", "=", '"', "\\", "{", "}", "[", ",", "null", "75001", "&amp;", "\u2028", "\x00"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join).filter(lambda t: not re.search(r"<\s*/?\s*parameter|</function>", t))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
TYPED = (
    st.tuples(st.just("string"), TEXTS) | st.tuples(st.just("integer"), st.integers()) | st.tuples(st.just("boolean"), st.booleans())
    | st.tuples(st.just("number"), st.floats(allow_nan=False, allow_infinity=False))
    | st.tuples(st.just("array"), st.lists(JSON_VALUES, max_size=4))
    | st.tuples(st.just("object"), st.dictionaries(TEXTS, JSON_VALUES, max_size=4))
)  # fmt: skip


@given(
    st.dictionaries(st.sampled_from(["a", "b_2", "zoë", "the name"]), TYPED, max_size=4),
    st.none() | st.lists(st.integers(1, 7), min_size=1, max_size=6),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_24_any_arguments_come_back(ask: Ask, typed: dict[str, tuple[str, Any]], steps: list[int] | None) -> None:
    properties = {name: {"type": kind} for name, (kind, _) in typed.items()}
    offered = {"type": "function", "function": {"name": "act", "parameters": {"type": "object", "properties": properties}}}
    arguments = {name: value for name, (_, value) in typed.items()}
    assert returned(ask, arguments, offered, steps) == arguments


# --- (25) traps


@pytest.mark.parametrize("steps", [None, *STEPS], ids=str)
def test_25_a_call_in_hermes_form_is_lost(ask: Ask, steps: list[int] | None) -> None:
    """The tool parser takes it for a call that it cannot read. In a thought it is text."""
    text = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    asked = request([USER], True)
    found = ask("parse", request=asked, text=text, prompt=prompt_of(asked), lengths=steps)
    assert (found["reasoning"], found["content"], found["calls"]) == (None, None, [])
    asked["chat_template_kwargs"] = {"enable_thinking": True}
    found = ask("parse", request=asked, text=f"{text}\n</think>{ANSWER}", prompt=prompt_of(asked), lengths=steps)
    assert (found["reasoning"], found["content"], found["calls"]) == (f"{text}\n", ANSWER, [])


@pytest.mark.parametrize("steps", [None, *STEPS], ids=str)
@pytest.mark.parametrize(
    "said", ["I may write <tool_call> now.\n", "<tool_call>\n\n", "<tool_call><function", "<tool_call> <tool_call>\n<fun"]
)
def test_25_a_tool_call_that_is_only_named_ends_no_thought(ask: Ask, said: str, steps: list[int] | None) -> None:
    """vLLM's own parser ends the thought there, and token by token or whole the answer is lost."""
    asked = request([USER], True, chat_template_kwargs={"enable_thinking": True})
    about: dict[str, Any] = {"request": asked, "prompt": prompt_of(asked), "lengths": steps}
    found = ask("parse", text=f"{said}</think>{ANSWER}", **about)
    assert (found["reasoning"], found["content"], found["calls"]) == (said, ANSWER, [])
    assert ask("parse", parser="qwen3", text=f"{said}</think>{ANSWER}", **about)["reasoning"] != said
    found = ask("parse", text=f"{said} </think>\n\n{CALL}", **about)
    assert (found["reasoning"], found["calls"]) == (f"{said} ", [{"name": "add", "arguments": '{"a": 2}'}])


def test_25_a_truncated_call(ask: Ask) -> None:
    """It arrives as a call whose arguments are not whole: empty in a whole answer, no JSON in a stream. finish_reason is "length"."""
    asked = request([USER], True)
    cut = CALL[: CALL.index("2") + 1]
    found = ask("parse", request=asked, text=cut, prompt=prompt_of(asked))
    assert (found["content"], found["calls"]) == (None, [{"name": "add", "arguments": "{}"}])
    found = ask("parse", request=asked, text=cut, prompt=prompt_of(asked), lengths=[1])
    assert (found["content"], found["calls"]) == (None, [{"name": "add", "arguments": '{"a": '}])
    found = ask("parse", request=asked, text="Yes. <tool_call>\n<func", prompt=prompt_of(asked))
    assert (found["content"], found["calls"]) == ("Yes. ", [])


@given(st.lists(st.sampled_from([*PIECES, "<function=", CALL]), max_size=10).map("".join), st.lists(st.integers(1, 7), min_size=1))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_25_a_stream_says_what_the_whole_says(ask: Ask, text: str, steps: list[int]) -> None:
    """Nothing of a thought is lost or doubled, however it is cut."""
    asked = request([USER], chat_template_kwargs={"enable_thinking": True})
    whole, streamed = (ask("parse", request=asked, text=text or "a", prompt=prompt_of(asked), lengths=cut) for cut in (None, steps))
    assert whole["reasoning"] == streamed["reasoning"]
    assert (whole["reasoning"] or "") == re.split(r"</think>|(?=<tool_call>\s*<function=)", text or "a", maxsplit=1)[0].removeprefix(
        "<think>"
    )


# --- (22, 23) the renderer


def test_22_the_content_format_is_openais_and_the_kwargs_arrive(ask: Ask) -> None:
    assert ask("content_format", template=OURS) == "openai"
    kwargs = {"enable_thinking": True, "preserve_thinking": False, "add_vision_id": True, "unknown": 1, "reasoning_effort": "high"}
    assert ask("kept_kwargs", template=OURS, kwargs=kwargs) == ["add_vision_id", "enable_thinking", "preserve_thinking"]
    assert "{%- generation" not in OURS and "{%- generation" in template(training=True)


def test_23_vllms_sandbox_renders_every_case_as_ours_does(ask: Ask) -> None:
    rendered = refused = 0
    for case in CASES:
        about = {
            "template": OURS,
            "messages": case.messages,
            "tools": case.tools,
            "kwargs": {"add_generation_prompt": False, **case.kwargs},
        }
        found = ask("render", **about)
        if "raises" in case.must:
            refused += found.startswith("refused: ")
        else:
            rendered += found == render(OURS, case.messages, case.tools, **case.kwargs)
    assert rendered + refused == len(CASES)
    assert min(rendered, refused) > 5


def test_the_plugin_needs_nothing_but_vllm() -> None:
    """vLLM imports it by its path, where mtpress may not be installed."""
    tree = ast.parse(REASONING_PARSER.read_text(encoding="utf-8"))
    names = [name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in (alias.name for alias in node.names)]
    names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"vllm"}
