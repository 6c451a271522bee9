"""Rules on the chat template: what it makes of conversations, not what it looks like.

In: a `Subject`. Out: problems that cite the numbered rules of docs/chat-template.md. Leaves out: rendering (chat/conformance.py).

A part of a plain conversation that does not reach the model is an error. What fails beyond that is a warning: the server works, and
refuses some valid requests, or computes the prompt's beginning again at every turn, or takes typed text for tokens. In what is a choice
(CHOICES) a template that decides otherwise is not wrong; it is a note.
"""

from collections.abc import Iterator, Sequence

from mtpress.chat.conformance import SPOKEN_OF, Trial, tried
from mtpress.chat.template import Failure
from mtpress.quant_config.tokenizer_files import marks, templates
from mtpress.quant_config.view import Subject
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

CHOICES = frozenset({1, 3, 5, 17})  # thinking unless asked, no tags, no handoff, earlier reasoning left out
OURS = "install mtpress's: mtpress repair CKPT OUT"
OWN = "nothing, if the model is to be served without; else quantize again with --chat-template replace"


def _first(subject: Subject) -> tuple[str, str | None] | None:
    return next(iter(templates(subject).items()), None)


def _trial(subject: Subject, text: str) -> Trial:
    return tried(text, bool(subject.stored_vision), marks(subject))


def _titles(failures: Sequence[Failure]) -> str:
    """Each number once, with the first case that shows it."""
    first = {failure.number: failure for failure in reversed(failures)}
    return "; ".join(f"{number} ({first[number].title})" for number in sorted(first))


def template_loses(subject: Subject) -> Iterator[Problem]:
    if (first := _first(subject)) is None:
        return
    name, text = first
    if text is None:
        yield Problem(f"{name}: holds no template in UTF-8", (name,))
    elif lost := (trial := _trial(subject, text)).lost:
        # a template that does nothing right fails alike everywhere: one reason is enough
        reasons = [f"{failure.title} ({failure.what})" for failure in lost]
        said = reasons[0] if len({failure.what for failure in lost}) == 1 and len(lost) > 1 else "; ".join(reasons)
        message = f"{name}: fails in {count(len(lost), 'part')} of a plain conversation: {said}"
        if trial.cripples:
            yield Problem(message, (name,))
        else:
            without = "it was made without, and " if any(SPOKEN_OF.get(failure.number) in trial.silent for failure in lost) else ""
            yield Problem(f"{message}; {without}plain talk goes through", (name,), OWN, "warning")


def template_behaviour(subject: Subject) -> Iterator[Problem]:
    yield from _failing(subject, "does not keep", choices=False)


def template_choices(subject: Subject) -> Iterator[Problem]:
    name, text = _first(subject) or ("", None)
    if text is not None and not (trial := _trial(subject, text)).cripples and trial.own_turns:
        yield Problem(f"{name}: its turns have marks of its author's own; no rule of docs/chat-template.md is held against it", (name,))
    yield from _failing(subject, "decides otherwise in", choices=True)


def _failing(subject: Subject, verb: str, choices: bool) -> Iterator[Problem]:
    name, text = _first(subject) or ("", None)
    found = _trial(subject, text).failures if text is not None else ()
    failing = [failure for failure in found if (failure.number in CHOICES) is choices]
    if failing:
        numbers = len({failure.number for failure in failing})
        yield Problem(f"{name}: {verb} {count(numbers, 'rule')} of docs/chat-template.md: {_titles(failing)}", (name,))


def template_twice(subject: Subject) -> Iterator[Problem]:
    found = templates(subject)
    texts = {text.removesuffix("\n") if text is not None else None for text in found.values()}
    if len(texts) > 1:
        yield Problem(f"{' and '.join(found)} hold different chat templates", tuple(found))


RULES = (
    Rule(
        "template-loses",
        "error",
        "The chat template refuses a plain conversation, leaves a part of it out (system message, tool, call, result, picture), or does "
        "not end: the model never sees what was sent. The marks of turns are its author's choice. A warning where it was made without (it "
        "never speaks of tools, or of pictures), where it leaves out the text before a call, or opens no turn for the answer.",
        OURS,
        template_loses,
    ),
    Rule(
        "template-behaviour",
        "warning",
        "The chat template, run on the cases of docs/chat-template.md, does not keep these rules: 7, 8 and 12 refuse valid requests; 16 "
        "breaks the prefix cache, so every turn is computed from its beginning; 21 takes what a user types for control tokens.",
        OURS,
        template_behaviour,
    ),
    Rule(
        "template-choices",
        "note",
        "Where it is a matter of choice, the chat template decides otherwise than mtpress's: 1 it thinks unless told not to, 3 it knows no "
        "tags for it, 5 it has no handoff, 17 it leaves out earlier reasoning. Other marks of turns are told too.",
        "nothing needs to be done; quantize installs mtpress's with chat_template: mtpress in the recipe",
        template_choices,
    ),
    Rule(
        "template-twice",
        "warning",
        "Two chat templates that differ: engines, and versions of one engine, read different ones.",
        "mtpress repair CKPT OUT keeps the one that transformers and vLLM read",
        template_twice,
    ),
)
