"""vLLM's reasoning parser for templates that do not think unless asked: `--reasoning-parser-plugin THIS_FILE --reasoning-parser mtpress`.

In: what the model writes, and what vLLM shows a parser of the request. Out: reasoning and content, whole and streamed, line ends as
the model wrote them. Leaves out: tool calls (`--tool-call-parser qwen3_xml`, which reads the content), and rendering.

vLLM's own parser takes the mode from chat_template_kwargs alone, and thinking where they are silent: behind a prompt whose think block
is closed the whole answer becomes reasoning, and content null (vllm#53284). Here the prompt decides, for it shows what the template made
of kwargs, tags and defaults: an open think block is thinking, a closed one or none is not. vLLM shows the prompt to every parser of
a stream and to that of a chat's first choice. The others (n > 1, include_reasoning=false, /v1/responses) go by the request, as the
template does (rule 3): enable_thinking=false or <|think_off|> in a system or developer message, then true or <|think_on|>, then
off. The kwargs that vLLM hands a parser hold --default-chat-template-kwargs where the request is silent. What a server keeps
under previous_response_id no parser sees: there a tag of an earlier response does not count.

A thought ends with </think>, or where a call begins that nobody closed it for: `<tool_call>` with `<function=` behind it. `<tool_call>`
alone is a word of the thought; vLLM's parser ends there, and what follows is lost.

vLLM imports this file by its path, in the API server and in the engine's process, so it needs vLLM and nothing else of mtpress.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParserManager

NAME = "mtpress"
THINK_ON, THINK_OFF = "<|think_on|>", "<|think_off|>"
TURN, OPEN, CLOSE, CALL, FUNCTION = "<|im_start|>", "<think>", "</think>", "<tool_call>", "<function="
END = re.compile(rf"{CLOSE}|(?={CALL}\s*{FUNCTION})")


def _beginnings(word: str) -> str:
    """A pattern for every beginning of a word but the word itself."""
    return "|".join(word[:n] for n in range(len(word) - 1, 0, -1))


BEGUN = re.compile(rf"(?:{CALL}\s*(?:{_beginnings(FUNCTION)})?|{_beginnings(CLOSE)}|{_beginnings(CALL)})\Z")  # what may become an END
Stock: Any = ReasoningParserManager.get_reasoning_parser("qwen3")  # what vLLM asks a parser for structured outputs and budgets is its


class MtpressReasoningParser(Stock):  # type: ignore[misc]
    """One request's. thinking: whether what the model writes begins inside a thought, None until the prompt or the request has said."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        self.tokenizer = tokenizer
        self.asked: Mapping[str, Any] = kwargs.get("chat_template_kwargs") or {}
        self.thinking: bool | None = None
        self.turn, self.open, self.close, self.call = (self.vocab.get(token) for token in (TURN, OPEN, CLOSE, CALL))
        if self.open is None or self.close is None:
            raise ValueError(f"the tokenizer has no {OPEN} and {CLOSE}")
        self.held, self.ended, self.begun = "", False, False  # of a stream

    # --- the mode

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether content follows the ids: of a prompt, of a prompt and what was written, or of what was written."""
        opened: bool | None = None
        for token in reversed(input_ids):
            if token in (self.close, self.call):
                opened = False
            elif token == self.open and opened is None:
                opened = True
            elif token == self.turn:
                if self.thinking is None:
                    self.thinking = bool(opened)
                return not opened
        return not (self._mode() if opened is None else opened)

    def _mode(self, request: Any = None) -> bool:
        if self.thinking is None and request is None:
            return thinks(self.asked, "")
        if self.thinking is None:
            self.thinking = starts_in_thought(self.asked, request)
        return self.thinking

    # --- whole

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """(reasoning, content), each None where it is empty."""
        if not self._mode(request):
            return None, model_output
        found = END.search(model_output)
        thought, content = (model_output[: found.start()], model_output[found.end() :]) if found else (model_output, "")
        return thought.removeprefix(OPEN) or None, content or None

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Of what was written, its end mark not counted."""
        if not self._mode():
            return 0
        for at, token in enumerate(token_ids):
            if token == self.close or (token == self.call and self._begins_call(token_ids, at)):
                return at
        return len(token_ids)

    def _begins_call(self, ids: Sequence[int], at: int) -> bool:
        few = list(islice(ids, at, at + 1 + 2 * len(FUNCTION)))  # a token is a character at least
        return END.match(self.tokenizer.decode(few)) is not None

    # --- streamed

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """What of the text is certain. The rest is held back: a few characters, which the next ones complete or not."""
        text, self.held = self.held + delta_text, ""
        if not self._mode():
            self.ended = True
            return DeltaMessage(content=text) if text else None
        content = ""
        if found := END.search(text):
            self.ended = True
            text, content = text[: found.start()], text[found.end() :]
        elif begun := BEGUN.search(text):
            text, self.held = text[: begun.start()], begun.group()
        if text and not self.begun:
            self.begun, text = True, text.removeprefix(OPEN)
        return DeltaMessage(reasoning=text or None, content=content or None) if text or content else None

    def has_engine_confirmed_reasoning_end(self) -> bool:
        return self.ended

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """None of a stream: the tool parser takes the content's first words as text then, as it does a whole answer."""
        return [] if self.ended else list(super().extract_content_ids(input_ids))

    def finish_streaming(self) -> DeltaMessage | None:
        """What is still held back when nothing more comes."""
        text, self.held = self.held, ""
        return DeltaMessage(reasoning=text) if text else None


def thinks(kwargs: Mapping[str, Any], instructions: str) -> bool:
    """The mode by rule 3. instructions: the text of all system and developer messages."""
    asked = kwargs.get("enable_thinking")
    return (asked is True or THINK_ON in instructions) and not (asked is False or THINK_OFF in instructions)


def starts_in_thought(kwargs: Mapping[str, Any], request: Any) -> bool:
    """Whether the answer to a request begins inside a thought. request: of chat (messages) or responses (instructions, input)."""
    messages = getattr(request, "messages", None) or getattr(request, "input", None) or ()
    messages = () if isinstance(messages, str) else messages
    if getattr(request, "continue_final_message", False) and messages and _field(messages[-1], "role") == "assistant":
        text = "".join(_texts(_field(messages[-1], "content")))
        return text.startswith(OPEN) and CLOSE not in text
    texts = [getattr(request, "instructions", None) or ""]
    texts += ["".join(_texts(_field(m, "content"))) for m in messages if _field(m, "role") in ("system", "developer")]
    return thinks(kwargs, "\n".join(texts))


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, list | tuple):
        for part in content:
            text = part if isinstance(part, str) else _field(part, "text")
            if isinstance(text, str):
                yield text


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


ReasoningParserManager.register_module(NAME, module=MtpressReasoningParser)
