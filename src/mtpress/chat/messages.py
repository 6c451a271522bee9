"""Messages as people, clients and data sets write them → messages that a chat template can be trusted with.

In: OpenAI-style messages. Out: copies of them: calls with their arguments as objects, reasoning in one field, content parts without
empty keys, and text in which no token of the vocabulary acts. Leaves out: rendering (chat/template.py), opening pictures (chat/encoder.py).

Our template neutralises control tokens too, for a server runs no other code before it. Here it is done for the templates of
others, and for what Jinja cannot do: read JSON, and say which message is wrong.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mtpress.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
MODE_TAGS = ("<|think_on|>", "<|think_off|>")
# of Qwen3.5's vocabulary; the same list stands in chat/qwen3_5.jinja
CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
)  # fmt: skip
# Words of the format with a token of their own. They end no turn, and people write about them: they stay as they are typed.
FORMAT_WORDS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_KINDS = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_BY_KEY = ("image", "image_url", "video", "video_url", "text")


def plain(text: str, control_tokens: Iterable[str] = CONTROL_TOKENS) -> str:
    """The text with a space behind the first character of each control token, which makes it legible text and no token."""
    for token in control_tokens:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def part_kind(part: Any) -> str | None:
    """ "text", "image" or "video"; None for any other content part. A type decides; without one the key that holds something."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, Mapping):
        return None
    named = _type_of(part)
    kind = _KINDS.get(named) if isinstance(named, str) else None
    return None if kind == "text" and not isinstance(part.get("text"), str) else kind


def normalize_messages(
    messages: Sequence[Mapping[str, Any]], *, where: str = "messages", control_tokens: Sequence[str] = CONTROL_TOKENS
) -> list[dict[str, Any]]:
    """Copies that mean the same; doing it twice changes nothing more.

    - arguments of a call that are a JSON string become the object it holds; none at all become {};
    - `reasoning` becomes `reasoning_content`, the name that every template reads, if that is not there already;
    - content parts lose keys that hold null (data sets add them) and get the type that their keys imply;
    - control tokens in text, reasoning, names and arguments become legible text (`plain`); mode tags stay.

    Pictures and other values are passed on, not copied. InputError names the message (from 1) and the field.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"{where}: no messages; a conversation is a list of one or more")
    return [_Reader(f"{where}: message {number}", control_tokens).message(message) for number, message in enumerate(messages, 1)]


class _Reader:
    """Reads one message; `at` says which, for errors."""

    def __init__(self, at: str, control_tokens: Sequence[str]) -> None:
        self.at, self.control_tokens = at, control_tokens

    def wrong(self, field: str, what: str) -> InputError:
        return InputError(f"{self.at}: {field} {what}")

    def plain(self, text: str) -> str:
        return plain(text, self.control_tokens)

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise InputError(f"{self.at}: must be an object with role and content, is a {type(message).__name__}")
        role = message.get("role")
        if role not in ROLES:
            raise self.wrong("role", f"must be one of {', '.join(ROLES)}, is {str(role)[:40]!r}")
        read = {**message, "content": self.content(message.get("content"), role)}
        reasoning = [self.reasoning(message, field) for field in ("reasoning_content", "reasoning")]
        read.pop("reasoning", None)
        read.pop("reasoning_content", None)
        if thought := next(filter(None, reasoning), None):
            read["reasoning_content"] = thought
        calls = read.pop("tool_calls", None)
        if calls is not None and not (isinstance(calls, Sequence) and not isinstance(calls, str)):
            raise self.wrong("tool_calls", f"must be a list, is a {type(calls).__name__}")
        if calls:
            if role != "assistant":
                raise self.wrong("tool_calls", f"belong to an assistant message, this is one of {role}")
            read["tool_calls"] = [self.call(call, f"tool_calls[{i}]") for i, call in enumerate(calls)]
        return read

    def reasoning(self, message: Mapping[str, Any], field: str) -> str | None:
        value = message.get(field)
        if value is not None and not isinstance(value, str):
            raise self.wrong(field, f"must be a string, is a {type(value).__name__}")
        return self.plain(value) if value else None

    def content(self, content: Any, role: str) -> Any:
        if content is None:
            return None
        if isinstance(content, str):
            return self.plain(content)
        if not isinstance(content, Sequence):
            raise self.wrong("content", f"must be a string or a list of parts, is a {type(content).__name__}")
        read: list[dict[str, Any]] = []
        for i, part in enumerate(content):
            found = self.part(part, f"content[{i}]", role)
            if read and found.keys() == read[-1].keys() == {"type", "text"}:
                read[-1]["text"] = self.plain(read[-1]["text"] + found["text"])  # a token may come about where two texts meet
            else:
                read.append(found)
        return read

    def part(self, part: Any, field: str, role: str) -> dict[str, Any]:
        kind = part_kind(part)
        if kind is None:
            raise self.wrong(field, f"must be a text, an image or a video, is {str(part)[:80]}")
        if kind == "text":
            if isinstance(part, str):
                return {"type": "text", "text": self.plain(part)}
            return {**_filled(part), "type": "text", "text": self.plain(part["text"])}
        if role in ("system", "developer"):
            raise self.wrong(field, f"is of kind {kind}, which a {role} message cannot hold")
        return {**_filled(part), "type": _type_of(part)}

    def call(self, call: Any, field: str) -> dict[str, Any]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise self.wrong(field, "must be an object with a function")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise self.wrong(f"{field}.name", "must be a string that names a function")
        outer = _filled(call) if function is not call else {}
        inner = {
            **_filled(function),
            "name": self.plain(name),
            "arguments": self.arguments(function.get("arguments"), f"{field}.arguments"),
        }
        return {"type": "function", **outer, "function": inner}

    def arguments(self, arguments: Any, field: str) -> dict[str, Any]:
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            return {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise self.wrong(field, f"must be JSON, is {arguments[:60]!r} ({str(error)[:60]})") from None
        if not isinstance(arguments, Mapping):
            raise self.wrong(field, f"must be an object, is a {type(arguments).__name__}")
        try:
            return {self.plain(str(key)): self.value(value) for key, value in arguments.items()}
        except RecursionError:
            raise self.wrong(field, "is nested too deeply") from None

    def value(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.plain(value)
        if isinstance(value, Mapping):
            return {self.plain(str(key)): self.value(inner) for key, inner in value.items()}
        return [self.value(inner) for inner in value] if isinstance(value, list | tuple) else value


def _filled(part: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in part.items() if value is not None}


def _type_of(part: Mapping[str, Any]) -> Any:
    return part["type"] if part.get("type") is not None else next((key for key in _BY_KEY if part.get(key) is not None), None)


def vision_parts(messages: Sequence[Mapping[str, Any]], kind: str) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """(source, part) of all images or videos of a conversation in order."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part_kind(part) == kind:
                yield part[kind] if part.get(kind) is not None else part.get(f"{kind}_url"), part
