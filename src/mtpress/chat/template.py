"""Chat templates as programs: ours, rendering of anyone's within limits, and what a template does wrong.

In: the text of a template; messages, tools and switches as a request holds them. Out: rendered text, or `Failure`s that cite the
numbered rules of docs/chat-template.md. Leaves out: tokenizers and pictures (chat/encoder.py), mending messages (chat/messages.py).

Templates run in the sandbox that transformers and vLLM use, under limits of time and memory. These do not reach into C (9 ** 9 ** 9), so
what a stranger wrote is rendered in a process of its own (chat/conformance.py).
"""

import json
import re
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from mtpress.alarm import TimeUp, alarm
from mtpress.chat.cases import CASES, NO_THOUGHT, Case, Continuation
from mtpress.errors import InputError

TEMPLATE = Path(__file__).with_name("qwen3_5.jinja")
MAX_RENDER_SECONDS, MAX_RENDER_BYTES = 5.0, 400_000_000
_TRAINING_MARK = re.compile(r"\{#- training: (generation|endgeneration) -#\}")
_CUT = "CONTINUE_FROM_HERE"


def template(training: bool = False) -> str:
    """The text of our template. training: with `{% generation %}` around what the model wrote, which only trainers know."""
    text = TEMPLATE.read_text(encoding="utf-8")
    return _TRAINING_MARK.sub(r"{%- \1 -%}", text) if training else text


@contextmanager
def within_limits() -> Iterator[None]:
    """Ends what runs too long with TimeUp and refuses it memory with MemoryError; the clock needs the main thread."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.exists():
        now = int(status.read_text().split()[0]) * resource.getpagesize()
        limit = now + MAX_RENDER_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        with alarm(MAX_RENDER_SECONDS):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def refusals(where: str) -> Iterator[None]:
    """Runs a template within limits; whatever it raises becomes an InputError that names `where`."""
    try:
        with within_limits():
            yield
    except TimeUp:
        raise InputError(too_long(where)) from None
    except MemoryError:
        raise InputError(too_large(where)) from None
    except Exception as error:  # jinja's errors share no base with transformers' own, and a template can meet any of Python's
        raise InputError(f"{where}: the chat template refuses this conversation: {reason(error)}") from None


def too_long(where: str) -> str:
    return f"{where}: the chat template ran for {MAX_RENDER_SECONDS:.0f} s; look for a loop without end in it"


def too_large(where: str) -> str:
    return f"{where}: the chat template wants over {MAX_RENDER_BYTES // 1_000_000} MB; look for text that it repeats"


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def render(
    template_text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any
) -> str:
    """The text of a conversation. kwargs: add_generation_prompt, enable_thinking, …; InputError says why a template refuses."""
    with refusals("messages"):
        return unguarded(template_text, messages, tools, kwargs)


def unguarded(
    text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, kwargs: Mapping[str, Any]
) -> str:
    """render() without limits, for those who set their own."""
    return str(_compile(text).render(messages=deepcopy(list(messages)), tools=deepcopy(tools), documents=None, **kwargs))


@lru_cache(maxsize=8)
def _compile(text: str) -> Any:
    """As transformers.utils.chat_template_utils compiles, without importing transformers (a second) for it; a test holds the two equal."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` … `{% endgeneration %}` of training templates: the body as it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: tuple[str, str] | None = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(text)


# --- the numbered rules ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """number: of the rule that does not hold; title: of the case that shows it; what: how, on one line."""

    number: int
    title: str
    what: str

    def __str__(self) -> str:
        return f"{self.number}. {self.title}: {self.what}"


def behaviour(template_text: str, cases: Sequence[Case] = CASES) -> list[Failure]:
    """What of the numbered rules a template does not keep. A template that does not compile, or does not end, fails every case."""
    failures: list[Failure] = []
    for case in cases:
        try:
            with within_limits():
                what = case_failure(template_text, case)
        except TimeUp:
            what = f"it ran for {MAX_RENDER_SECONDS:.0f} s"
            return [*failures, *(Failure(c.number, c.title, what) for c in cases[cases.index(case) :])]
        except MemoryError:
            what = f"it wants over {MAX_RENDER_BYTES // 1_000_000} MB"
        except Exception as error:  # a template can meet any of Python's errors
            what = f"raises {type(error).__name__}: {reason(error)}"
        if what is not None:
            failures.append(Failure(case.number, case.title, what))
    return failures


def case_failure(template_text: str, case: Case) -> str | None:
    """What of `case` does not hold, None if all of it does. Raises what the template raises."""
    shown = _Shown(template_text, case)
    for name, argument in case.must.items():
        if (what := PREDICATES[name](shown, argument)) is not None:
            return what
    return None


class _Shown:
    """One case in one template; `text` is rendered when it is first asked for."""

    def __init__(self, template_text: str, case: Case) -> None:
        self.template_text, self.case = template_text, case

    @property
    def text(self) -> str:
        return self.render(self.case.messages)

    def render(self, messages: Sequence[Mapping[str, Any]], **changed: Any) -> str:
        kwargs = {**self.case.kwargs, "tools": self.case.tools, **changed}
        return unguarded(self.template_text, messages, kwargs.pop("tools"), {k: v for k, v in kwargs.items() if v is not ...})


def _equals(shown: _Shown, text: str) -> str | None:
    return None if shown.text == text else f"{_difference(shown.text, text)}"


def _words(shown: _Shown, text: str) -> str | None:
    """Equal but for the thought, which is there or not by the template's own default."""
    told = shown.text.replace(NO_THOUGHT, "").removesuffix("<think>\n")
    return None if told == text else f"{_difference(told, text)}"


def _starts(shown: _Shown, text: str) -> str | None:
    return None if shown.text.startswith(text) else f"does not begin as it must: {_difference(shown.text[: len(text)], text)}"


def _ends(shown: _Shown, text: str) -> str | None:
    return None if shown.text.endswith(text) else f"ends with {_short(shown.text[-len(text) - 20 :])}, not with {_short(text)}"


def _goes_on(shown: _Shown, mark: str) -> str | None:
    """The prompt does not end where a turn does."""
    return f"the prompt ends with {_short(mark)} and opens no turn" if shown.text.rstrip().endswith(mark) else None


def _holds(shown: _Shown, texts: Sequence[str]) -> str | None:
    at = 0
    for text in texts:
        found = shown.text.find(text, at)
        if found < 0:
            return f"{_short(text)} is missing" + (", or out of order" if text in shown.text else "")
        at = found + len(text)
    return None


def _lacks(shown: _Shown, texts: Sequence[str]) -> str | None:
    return next((f"holds {_short(text)}" for text in texts if text in shown.text), None)


def _counts(shown: _Shown, counts: Mapping[str, int]) -> str | None:
    rendered = shown.text
    return next((f"holds {_short(t)} {rendered.count(t)} times, not {n}" for t, n in counts.items() if rendered.count(t) != n), None)


def _raises(shown: _Shown, words: str) -> str | None:
    from jinja2 import TemplateError, TemplateRuntimeError, TemplateSyntaxError

    try:
        rendered = shown.text
    except TemplateError as error:
        if isinstance(error, TemplateRuntimeError | TemplateSyntaxError):
            return f"fails by accident ({type(error).__name__}: {reason(error)}) instead of saying what is wrong"
        return None if re.search(words, str(error), re.IGNORECASE) else f"refuses for another reason: {_short(reason(error))}"
    except Exception as error:
        return f"fails by accident ({type(error).__name__}: {reason(error)}) instead of saying what is wrong"
    return f"takes it, and renders {_short(rendered[-60:])}"


def _same_as(shown: _Shown, messages: Sequence[Mapping[str, Any]]) -> str | None:
    other = shown.render(messages)
    return None if shown.text == other else f"differs from what means the same: {_difference(shown.text, other)}"


def _same_mode(shown: _Shown, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The prompt ends as that of the other messages."""
    ends, wanted = (text.rpartition("<|im_start|>")[2] for text in (shown.text, shown.render(messages)))
    return None if ends == wanted else f"the prompt ends with {_short(ends)}, which without the tag is {_short(wanted)}"


def _unset(shown: _Shown, names: Sequence[str]) -> str | None:
    """The same without these kwargs; "tools" is one of them."""
    other = shown.render(shown.case.messages, **{name: None if name == "tools" else ... for name in names})
    return None if shown.text == other else f"differs from what it is without: {_difference(shown.text, other)}"


def _prefix(shown: _Shown, growth: Continuation) -> str | None:
    """(16) prompt + completion is how the next prompt begins."""
    before = shown.render(shown.case.messages, add_generation_prompt=True) + growth.completion
    after = shown.render([*shown.case.messages, growth.message, *growth.then], add_generation_prompt=True)
    return None if after.startswith(before) else f"the next prompt begins otherwise: {_difference(after[: len(before)], before)}"


def _prefills(shown: _Shown, text: str) -> str | None:
    """(18) Cut where the last message ends, as continue_final_message cuts, the text ends with `text`."""
    *earlier, last = shown.case.messages
    rendered = shown.render([*earlier, {**last, "content": last["content"] + _CUT}])
    if rendered.count(_CUT) != 1:
        return "the text to go on from is not there"
    start = rendered.partition(_CUT)[0]
    return None if start.endswith(text) else f"goes on from {_short(start[-len(text) - 20 :])}, not from {_short(text)}"


def _handoff(shown: _Shown, with_tools: Sequence[Mapping[str, Any]]) -> str | None:
    """(5) Thinking adds an instruction to the end of the system block, once, and another one where there are tools."""

    def added(tools: Sequence[Mapping[str, Any]] | None) -> tuple[str, str, str]:
        on, off = (shown.render(shown.case.messages, enable_thinking=thinking, tools=tools) for thinking in (True, False))
        block_on, block_off = (found.group(1) if (found := _SYSTEM_BLOCK.match(text)) else "" for text in (on, off))
        return block_on.removeprefix(block_off).strip(), on, off

    plain, on, off = added(None)
    if not plain or not all(re.search(word, plain, re.IGNORECASE) for word in ("verif", "clos|end|finish", "answer")):
        return "thinking adds no instruction to verify, close the thought and answer to the end of the system block"
    if on.count(plain) != 1 or plain in off:
        return f"the instruction stands {on.count(plain)} times in a thinking prompt, {off.count(plain)} times in another"
    toolish, on, off = added(with_tools)
    if not toolish or on.count(toolish) != 1 or toolish in off or plain in on:
        return "with tools the instruction is not one of its own, once"
    return None


_SYSTEM_BLOCK = re.compile(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", re.DOTALL)
PREDICATES: Mapping[str, Callable[[_Shown, Any], str | None]] = {
    "equals": _equals, "words": _words, "starts": _starts, "ends": _ends, "goes_on": _goes_on, "holds": _holds, "lacks": _lacks,
    "counts": _counts, "raises": _raises,
    "same_as": _same_as, "same_mode": _same_mode, "unset": _unset, "prefix": _prefix, "prefills": _prefills, "handoff": _handoff,
}  # fmt: skip


def _short(text: str) -> str:
    return json.dumps(text if len(text) <= 80 else f"{text[:38]}…{text[-38:]}", ensure_ascii=False)


def _difference(is_: str, wanted: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(is_, wanted, strict=False)) if a != b), min(len(is_), len(wanted)))
    return f"{_short(is_[at : at + 40])} where {_short(wanted[at : at + 40])} must be"
