"""The command that `mtpress serve` composes for the built-in model, started once: rule 26 of docs/chat-template.md as clients see it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mtpress.engine.launch.installed import find_engine
from mtpress.engine.launch.launch import compose
from mtpress.engine.memory.hardware import read_hardware
from mtpress.engine.memory.served_model import ServedModel
from mtpress.engine.server.server import Server
from mtpress.errors import InputError
from serving import BUILTIN_MODEL, REAL_ENVIRONMENT

pytestmark = pytest.mark.engine

ON, OFF = "<|think_on|>", "<|think_off|>"
# a name → (what the system says, chat_template_kwargs, whether the model thinks)
MODES: dict[str, tuple[str | None, dict[str, bool], bool]] = {
    "no kwarg": (None, {}, False),
    "false": (None, {"enable_thinking": False}, False),
    "true": (None, {"enable_thinking": True}, True),
    "on-tag": (ON, {}, True),
    "off-tag": (OFF, {}, False),
    "off-tag and true": (OFF, {"enable_thinking": True}, False),
}
# What the model has learned (tiny/corpus.py): sums with and without a thought, calls of these functions.
SUM, SAID = "What is 71 + 95?", "71 + 95 = 166."
TOWN, REPORT = "What is the weather in Umber?", "The weather in Umber is"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


@pytest.fixture(scope="module")
def server(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    engine, model, hardware = find_engine(str(engine_python)), ServedModel.read(BUILTIN_MODEL), read_hardware()
    launch = compose(model, engine, hardware, profile="cpu", max_model_len=1024, max_num_seqs=4, force=True, environ={})
    launch = replace(launch, environment={**launch.environment, **REAL_ENVIRONMENT})
    assert "--reasoning-parser-plugin" in launch.command
    assert launch.num_speculative_tokens == 1  # so that a step brings one token or two
    with Server(launch, tmp_path_factory.mktemp("reasoning") / "engine.log", say=lambda line: None) as running:
        yield running


def asked(question: str, mode: str, tools: bool, **more: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages, the rest of a request's body)."""
    instruction, kwargs, _ = MODES[mode]
    messages = [{"role": "system", "content": instruction}] if instruction is not None else []
    body: dict[str, Any] = {"max_tokens": 96, "temperature": 0, **({"tools": [WEATHER]} if tools else {}), **more}
    return [*messages, {"role": "user", "content": question}], body | ({"chat_template_kwargs": kwargs} if kwargs else {})


def answered(server: Server, stream: bool, messages: list[dict[str, Any]], body: dict[str, Any]) -> dict[str, Any]:
    """reasoning and content (None where nothing came), calls as (name, arguments), finish_reason, usage."""
    if not stream:
        answer = server.client.chat(messages, **body)
        choice = answer["choices"][0]
        message = choice["message"]
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or []]
        return {
            "reasoning": message.get("reasoning"), "content": message.get("content"), "calls": calls,
            "finish_reason": choice["finish_reason"], "usage": answer["usage"],
        }  # fmt: skip
    parts: dict[str, str] = {"reasoning": "", "content": ""}
    pieces: list[list[str]] = []
    finish, usage = None, {}
    for chunk in server.client.stream_chat(messages, **body):
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            finish = choice.get("finish_reason") or finish
            for field in parts:
                parts[field] += choice["delta"].get(field) or ""
            for call in choice["delta"].get("tool_calls") or []:
                while len(pieces) <= call["index"]:
                    pieces.append(["", ""])
                pieces[call["index"]][0] += call["function"].get("name") or ""
                pieces[call["index"]][1] += call["function"].get("arguments") or ""
    return {
        **{field: text or None for field, text in parts.items()}, "calls": [(name, arguments) for name, arguments in pieces],
        "finish_reason": finish, "usage": usage,
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("mode", list(MODES))
def test_26_an_answer_lands_in_content_and_a_thought_in_reasoning(server: Server, mode: str, stream: bool) -> None:
    found = answered(server, stream, *asked(SUM, mode, tools=False))
    assert (found["finish_reason"], found["calls"]) == ("stop", [])
    assert (found["content"] or "").strip() == SAID, found
    if MODES[mode][2]:
        assert found["reasoning"] == "Ones: 1 + 5 = 6, write 6, carry 0.\nTens: 7 + 9 + 0 = 16.\nSo the sum is 166.\n", found
        assert 30 < found["usage"]["completion_tokens_details"]["reasoning_tokens"] < found["usage"]["completion_tokens"] - 5
    else:
        assert found["reasoning"] is None, found
        assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("mode", list(MODES))
def test_26_a_call_arrives_parsed(server: Server, mode: str, stream: bool) -> None:
    found = answered(server, stream, *asked(TOWN, mode, tools=True))
    assert [(name, json.loads(arguments)) for name, arguments in found["calls"]] == [("get_weather", {"town": "Umber"})], found
    assert found["finish_reason"] == "tool_calls"
    assert not (found["content"] or "").strip()
    assert found["reasoning"] == ("The user wants get_weather. I call it.\n" if MODES[mode][2] else None), found


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("mode", [mode for mode, (_, _, thinks) in MODES.items() if not thinks])  # it has learned no thought there
def test_26_with_tools_an_answer_lands_in_content(server: Server, mode: str, stream: bool) -> None:
    messages, body = asked(TOWN, mode, tools=True)
    call = {"id": "call-1", "type": "function", "function": {"name": "get_weather", "arguments": '{"town": "Umber"}'}}
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "warm and sunny"},
    ]
    found = answered(server, stream, messages, body)
    assert (found["content"] or "").startswith(REPORT), found
    assert (found["reasoning"], found["calls"], found["finish_reason"]) == (None, [], "stop")


def test_26_every_choice_of_several(server: Server) -> None:
    """vLLM shows the prompt to the parser of the first choice alone."""
    for mode in ("on-tag", "no kwarg"):
        messages, body = asked(SUM, mode, tools=False, n=3, temperature=0.01)
        choices = [choice["message"] for choice in server.client.chat(messages, **body)["choices"]]
        assert len(choices) == 3
        assert all((message["content"] or "").strip().startswith(SAID) for message in choices), choices
        assert [bool(message.get("reasoning")) for message in choices] == [MODES[mode][2]] * 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_26_without_the_reasoning_the_content_is_the_same(server: Server, stream: bool) -> None:
    found = answered(server, stream, *asked(SUM, "on-tag", tools=False, include_reasoning=False))
    assert found["reasoning"] is None
    assert (found["content"] or "").strip().startswith(SAID), found


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_26_a_thought_of_a_few_tokens(server: Server, stream: bool) -> None:
    """thinking_token_budget: the engine closes the thought by the marks that the parser names."""
    whole = answered(server, stream, *asked(SUM, "on-tag", tools=False))
    cut = answered(server, stream, *asked(SUM, "on-tag", tools=False, thinking_token_budget=8))
    assert whole["reasoning"].startswith(cut["reasoning"]) and len(cut["reasoning"]) < len(whole["reasoning"]) / 2, (whole, cut)
    assert cut["content"] and "think>" not in cut["content"]


def test_26_other_ways_to_ask(server: Server) -> None:
    """/v1/responses shows a parser no prompt; reasoning_effort is vLLM's own word for the kwarg; a continued thought goes on."""
    for instructions, thinks in ((ON, True), (None, False)):
        body = {"model": server.client.model, "input": SUM, "temperature": 0, "max_output_tokens": 96, "instructions": instructions}
        output = httpx2.post(f"{server.launch.url}/v1/responses", json=body, timeout=600, trust_env=False).json()["output"]
        assert [item["type"] for item in output] == (["reasoning", "message"] if thinks else ["message"])
        assert output[-1]["content"][0]["text"].strip() == SAID
    for effort, thinks in (("low", True), ("none", False)):
        found = answered(server, False, *asked(SUM, "no kwarg", tools=False, reasoning_effort=effort))
        assert ((found["content"] or "").strip(), bool(found["reasoning"])) == (SAID, thinks)
    messages, body = asked(SUM, "on-tag", tools=False, add_generation_prompt=False, continue_final_message=True)
    begun = [*messages, {"role": "assistant", "content": "<think>\nOnes: 1 + 5 = 6, write 6,"}]
    found = answered(server, False, begun, body)
    assert ((found["content"] or "").strip(), found["reasoning"].startswith(" carry 0.")) == (SAID, True)


def test_2_a_mode_that_is_no_bool_is_refused(server: Server) -> None:
    messages, body = asked(SUM, "no kwarg", tools=False)
    with pytest.raises(InputError, match="enable_thinking must be true or false"):
        server.client.chat(messages, **body, chat_template_kwargs={"enable_thinking": "false"})


def test_16_a_thought_that_is_sent_back_keeps_the_prompt(server: Server) -> None:
    """What the server answered, sent back as it came, is rendered as the model wrote it: the next prompt begins with these tokens."""
    messages, body = asked(SUM, "on-tag", tools=False, return_token_ids=True)
    answer = server.client.chat(messages, **body)
    written = answer["prompt_token_ids"] + answer["choices"][0]["token_ids"]
    message = answer["choices"][0]["message"]
    turn = {"role": "assistant", "content": message["content"], "reasoning": message["reasoning"]}
    following = server.client.chat([*messages, turn, {"role": "user", "content": SUM}], **body)
    assert following["prompt_token_ids"][: len(written)] == written
