"""Answers as vLLM's own parsers read them, and what its renderer makes of a template; runs under the engine's python, starts no engine.

python parse_answers.py CHECKPOINT      one JSON object a line on stdin ("do" names the function) → one a line on stdout
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

from tokenizers import normalizers
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError
from vllm.parser import ParserManager
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.hf import _detect_content_format, resolve_chat_template_kwargs, safe_apply_chat_template

import mtpress.engine.launch.settings

ReasoningParserManager.import_reasoning_parser(str(mtpress.engine.launch.settings.REASONING_PARSER))
TOKENIZER = AutoTokenizer.from_pretrained(sys.argv[1])
TOKENIZER.backend_tokenizer.normalizer = normalizers.Sequence([])  # a model writes what no normalizer has seen
PARSERS: dict[str, Any] = {}


def parser_class(name: str) -> Any:
    if name not in PARSERS:
        PARSERS[name] = ParserManager.get_parser("qwen3_xml", name, True, "m", tokenizer=TOKENIZER)
    return PARSERS[name]


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def deltas(ids: list[int], lengths: list[int]) -> Iterator[tuple[str, list[int]]]:
    """(text, ids) of steps of so many tokens, as a detokenizer hands them on: half a character waits for its other half."""
    at, said, turn = 0, 0, 0
    while at < len(ids):
        step = ids[at : at + lengths[turn % len(lengths)]]
        at, turn = at + len(step), turn + 1
        text = TOKENIZER.decode(ids[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        known = text if at == len(ids) else text.rstrip("\ufffd")
        yield known[said:], step
        said = max(said, len(known))


def request_of(asked: dict[str, Any]) -> Any:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **asked.get("request", {})}
    if "input" in body:
        del body["messages"]
        return ResponsesRequest(**body)
    if body.get("tools"):
        body.setdefault("tool_choice", "auto")
    return ChatCompletionRequest(**body)


def parse(asked: dict[str, Any]) -> dict[str, Any]:
    """parser: its name; text: the answer; prompt: absent where the parser is not shown it; lengths: tokens a step, absent: whole."""
    request = request_of(asked)
    kwargs = getattr(request, "chat_template_kwargs", None) or {}
    parser = parser_class(asked.get("parser", "mtpress"))(TOKENIZER, request.tools, chat_template_kwargs=kwargs)
    ids, prompt = ids_of(asked["text"]), ids_of(asked["prompt"]) if "prompt" in asked else None
    if not asked.get("lengths"):
        if prompt is not None:
            parser.is_reasoning_end(prompt)
        reasoning, content, calls = parser.parse(asked["text"], request, enable_auto_tools=True, model_output_token_ids=ids)
        found = [{"name": call.name, "arguments": call.arguments} for call in calls or []]
    else:
        steps = list(deltas(ids, asked["lengths"]))
        parts: dict[str, list[str]] = {"reasoning": [], "content": []}
        found = []
        for number, (text, step) in enumerate(steps):
            delta = parser.parse_delta(text, step, request, prompt, finished=number == len(steps) - 1)
            for field in parts:
                parts[field].append(getattr(delta, field, None) or "")
            for call in getattr(delta, "tool_calls", None) or []:
                while len(found) <= call.index:
                    found.append({"name": "", "arguments": ""})
                if call.function is not None:
                    found[call.index]["name"] += call.function.name or ""
                    found[call.index]["arguments"] += call.function.arguments or ""
        reasoning, content = ("".join(parts[field]) or None for field in ("reasoning", "content"))
    thought = parser.count_reasoning_tokens(ids)
    return {"reasoning": reasoning, "content": content, "calls": found, "reasoning_tokens": thought, "tokens": len(ids)}


def reasoning_end(asked: dict[str, Any]) -> bool:
    """Whether the parser of a request takes a text for one that content follows."""
    parser = ReasoningParserManager.get_reasoning_parser("mtpress")(TOKENIZER, chat_template_kwargs=asked.get("kwargs", {}))
    return bool(parser.is_reasoning_end(ids_of(asked["text"])))


def marks(asked: dict[str, Any]) -> list[Any]:
    """What ReasoningConfig takes from the parser for thinking_token_budget."""
    parser = ReasoningParserManager.get_reasoning_parser("mtpress")(TOKENIZER)
    return [parser.reasoning_start_str, parser.reasoning_end_str]


def content_format(asked: dict[str, Any]) -> str:
    return str(_detect_content_format(asked["template"], default="string"))


def kept_kwargs(asked: dict[str, Any]) -> list[str]:
    """Those of asked["kwargs"] that vLLM hands a template."""
    return sorted(resolve_chat_template_kwargs(TOKENIZER, asked["template"], asked["kwargs"]))


def render(asked: dict[str, Any]) -> str:
    """As vLLM renders, by transformers in its sandbox; what it refuses as the error's text."""
    try:
        text = safe_apply_chat_template(
            Mock(multimodal_config=None, trust_remote_code=False),
            TOKENIZER,
            asked["messages"],
            tools=asked.get("tools"),
            chat_template=asked["template"],
            tokenize=False,
            **asked["kwargs"],
        )
    except (VLLMValidationError, KeyError) as error:  # a message without a role: the API refuses it before
        return f"refused: {error}"
    return str(text)


def timed(asked: dict[str, Any]) -> float:
    """Seconds to make the parsers of a request."""
    start = time.perf_counter()
    for _ in range(asked["times"]):
        parser_class(asked["parser"])(TOKENIZER, None, chat_template_kwargs={})
    return (time.perf_counter() - start) / asked["times"]


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr  # vLLM's log goes elsewhere
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"answer": globals()[asked["do"]](asked)}), file=answers, flush=True)
