"""A stranger's chat template, rendered and tried in a process of its own: a template is a program.

In: the text of a template; a conversation, or none. Out: its text, or the `Failure`s of the plain conversation below and of the numbered
rules. Leaves out: judging them (rules/template.py). A template that never ends, in Python or in C, and one that eats memory cost seconds
and megabytes at most; ours is not tried, as the tests do that.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Any

from mtpress.chat import template as templating
from mtpress.chat.cases import (
    ASSISTANT,
    CASES,
    HELLO,
    IMAGE,
    OFF,
    PREAMBLE,
    WEATHER,
    Case,
    assistant,
    call,
    system,
    tool,
    user,
    written,
)
from mtpress.chat.cases import END as TURN_END
from mtpress.chat.template import Failure, behaviour, template
from mtpress.confined import Confined, TooLargeError, TooLongError
from mtpress.errors import InputError

# What keeps no talk from the model where it fails: a template for training opens no turn, Llama 3.1's drops the text.
NO_TURN, NO_TEXT = "a turn for the answer", "the text before a call"
MAX_SECONDS = 20.0  # all cases take half a second
MAX_TEMPLATE_CHARS = 1_000_000


def plain_conversation(pictures: bool = True) -> tuple[Case, ...]:
    """What every server sends: whatever of it is not in the prompt, the model never sees. No markup is asked for, only the words: the
    marks of turns are their author's choice."""
    called = (user("Rain in Tarn?"), assistant("I look it up.", tool_calls=[call("get_weather", town="Tarn")]), tool("Drizzle, 9 degrees."))
    picture: Any = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is on it?"}]
    cases = (
        Case(1, "a question", HELLO, {"holds": ("Hello!",)}, kwargs=OFF),
        Case(1, NO_TURN, HELLO, {"goes_on": TURN_END.strip()}, kwargs=OFF),
        Case(7, "a system message", (system("Be kind."), *HELLO), {"holds": ("Be kind.", "Hello!")}, kwargs=OFF),
        Case(10, "a tool", HELLO, {"holds": ("get_weather", "town")}, [WEATHER], OFF),
        Case(13, "a call", called, {"holds": ("get_weather", "town", "Tarn")}, kwargs=OFF),
        Case(13, NO_TEXT, called, {"holds": ("I look it up.",)}, kwargs=OFF),
        Case(14, "a tool's result", called, {"holds": ("Drizzle, 9 degrees.",)}, kwargs=OFF),
        Case(17, "an earlier answer", (*HELLO, assistant("Good morning."), *HELLO), {"holds": ("Good morning.",)}, kwargs=OFF),
        Case(19, "a picture", (user(picture),), {"holds": ("<|image_pad|>", "What is on it?")}, kwargs=OFF),
    )
    return cases if pictures else cases[:-1]


SPOKEN_OF = {10: "tool", 13: "tool", 14: "tool", 19: "image"}  # the rest every model is sent: questions, answers, system messages
TURN_MARK = "<|im_start|>"


def official_format(pictures: bool = True) -> tuple[Case, ...]:
    """What the templates of Qwen3.5, 3.6 and 3.8 and ours write alike, but for the thought. A system prompt that nobody sent, and another
    form of anything, show a template of its author's own."""
    start, hello = "<|im_start|>", f"<|im_start|>user\nHello!{TURN_END}"
    called = (user("Rain in Tarn?"), assistant("I look it up.", tool_calls=[call("get_weather", town="Tarn")]), tool("Drizzle, 9 degrees."))
    turns = (
        f"{start}user\nRain in Tarn?{TURN_END}{ASSISTANT}I look it up.\n\n{written('get_weather', town='Tarn')}{TURN_END}"
        f"{start}user\n<tool_response>\nDrizzle, 9 degrees.\n</tool_response>{TURN_END}{ASSISTANT}"
    )
    picture = (user([{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is on it?"}]),)
    cases = (
        Case(1, "a question without a system message", HELLO, {"words": f"{hello}{ASSISTANT}"}, kwargs=OFF),
        Case(
            7, "a system message", (system("Be kind."), *HELLO),
            {"words": f"{start}system\nBe kind.{TURN_END}{hello}{ASSISTANT}"}, kwargs=OFF,
        ),
        Case(
            17, "an earlier answer", (*HELLO, assistant("Good morning."), *HELLO),
            {"words": f"{hello}{ASSISTANT}Good morning.{TURN_END}{hello}{ASSISTANT}"}, kwargs=OFF,
        ),
        Case(10, "a tool", HELLO, {"words": f"{PREAMBLE}{TURN_END}{hello}{ASSISTANT}"}, [WEATHER], OFF),
        Case(13, "a call and its result", called, {"words": f"{PREAMBLE}{TURN_END}{turns}"}, [WEATHER], OFF),
        Case(19, "a picture", picture, {"words": f"{start}user\n{IMAGE}What is on it?{TURN_END}{ASSISTANT}"}, kwargs=OFF),
    )  # fmt: skip
    return cases if pictures else cases[:-1]


class RefusedError(InputError):
    """A template that raises an error on a conversation, as it may."""


@dataclass(frozen=True)
class Trial:
    """lost: what of the plain conversation fails; if nothing does, failures: of the numbered rules. foreign: where it leaves the official
    format. silent: of "tool", "image" and the official mark of a turn, what is not in it at all."""

    lost: tuple[Failure, ...] = ()
    failures: tuple[Failure, ...] = ()
    foreign: tuple[Failure, ...] = ()
    silent: tuple[str, ...] = ()

    @property
    def cripples(self) -> tuple[Failure, ...]:
        """Of `lost`, what a template fails in that it should do. One that never speaks of tools, or of pictures, was made without."""
        return tuple(f for f in self.lost if f.title not in (NO_TURN, NO_TEXT) and SPOKEN_OF.get(f.number) not in self.silent)

    @property
    def own_turns(self) -> bool:
        """Whether its turns have other marks than the official ones, which most of the numbered rules look for."""
        return TURN_MARK in self.silent


@lru_cache(maxsize=16)
def tried(text: str, pictures: bool = True, tokens: tuple[tuple[str, str], ...] = ()) -> Trial:
    """The trial of a template, each text once. pictures: whether the model sees any. tokens: eos_token and the like, which it may write."""
    if text == template():
        return Trial()
    if len(text) > MAX_TEMPLATE_CHARS:
        return Trial((_whole(f"it has {len(text):,} characters, over {MAX_TEMPLATE_CHARS:,}"),))
    try:
        parts = _process.ask({"try": [text, pictures, dict(tokens)]}, MAX_SECONDS)
    except TooLongError:
        return Trial((_whole(f"rendering takes over {MAX_SECONDS:.0f} s; look for a loop without end in it"),))
    except TooLargeError:
        return Trial((_whole("rendering ends the process it runs in"),))
    except ValueError as error:
        return Trial((_whole(str(error)),))
    lost, failures, foreign = (tuple(Failure(*entry) for entry in part) for part in parts)
    return Trial(lost, failures, foreign, tuple(word for word in ("tool", "image", TURN_MARK) if word not in text))


def rendered(
    text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, *, where: str, **kwargs: Any
) -> str:
    """What a template makes of a conversation. InputError, naming `where`, if it refuses it, does not end or eats memory."""
    if text == template():
        with templating.refusals(where):
            return templating.unguarded(text, messages, tools, kwargs)
    if len(text) > MAX_TEMPLATE_CHARS:
        raise InputError(f"{where}: the chat template has {len(text):,} characters, over {MAX_TEMPLATE_CHARS:,}")
    asked = json.loads(json.dumps([text, messages, tools, kwargs], default=_kind))
    try:
        return str(_process.ask({"render": asked}, templating.MAX_RENDER_SECONDS))
    except TooLongError:
        raise InputError(templating.too_long(where)) from None
    except TooLargeError:
        raise InputError(templating.too_large(where)) from None
    except ValueError as error:
        raise RefusedError(f"{where}: the chat template refuses this conversation: {error}") from None


def _kind(value: object) -> str:
    """What a template sees of a picture: that there is one."""
    return type(value).__name__


def _whole(what: str) -> Failure:
    return Failure(1, "any conversation", what)


def judged(text: str, pictures: bool, tokens: Mapping[str, str]) -> tuple[Sequence[Failure], Sequence[Failure]]:
    """(lost, failures), in this process."""
    lost = behaviour(text, _with(tokens, plain_conversation(pictures)))
    if lost or TURN_MARK not in text:
        return lost, []
    return lost, behaviour(text, _with(tokens, [case for case in CASES if pictures or not shows_pictures(case)]))


def _with(tokens: Mapping[str, str], cases: Sequence[Case]) -> list[Case]:
    """The cases as a server asks them, which tells a template the tokenizer's own marks."""
    return [replace(case, kwargs={**tokens, **case.kwargs}) for case in cases]


def prepare() -> None:
    """Imports Jinja, which is not the template's time."""
    templating.unguarded(template(), HELLO, None, {})


def answer(request: Mapping[str, Any]) -> Any:
    """What the process of its own is asked: {"try": [text, pictures, tokens]} or {"render": [text, messages, tools, kwargs]}."""
    if "try" in request:
        text, pictures, tokens = request["try"]
        parts = (*judged(text, pictures, tokens), behaviour(text, _with(tokens, official_format(pictures))))
        return [[astuple(failure) for failure in part] for part in parts]
    return templating.unguarded(*request["render"])


def shows_pictures(case: Case) -> bool:
    """Whether a message of the case holds a picture or video, which a model without a vision tower sees none of."""
    return any(f"'{kind}" in repr(case.messages) for kind in ("image", "video"))


_process = Confined(__name__, templating.MAX_RENDER_BYTES)
