"""Starts the engine on a checkpoint and asks it: what loads, what is answered, what the draft head is worth, whether logits are the base's.

In: a checkpoint, an engine and a machine; the base, where the checkpoint is to be held against it. Out: a `Trial`. Leaves out: whether
that is good enough (rules/engine.py). The engine is started as `mtpress serve` starts it, with a short context and with vLLM's check for
missing tensors: once with drafts, once without, and once on the base.

The texts compared are greedy. The base scores the checkpoint's own text (teacher forcing), so both see the same prefix at every token:

    KL ≈ Σ p (log p − log q) over the base's NUM_CANDIDATES likeliest tokens, p of the base, q of the checkpoint; where q is not among
    the checkpoint's own likeliest it is taken as the last of those, so the sum is a lower bound. In nats a token, mean over all tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.engine.server.metrics import SpecDecode
from mtpress.engine.trial.canaries import Canary, is_right, picture_canaries, story_canaries, text_canaries, tool_canaries
from mtpress.errors import EngineError, InputError, MtpressError, ResourceError

if TYPE_CHECKING:
    from mtpress.engine.launch.installed import Engine
    from mtpress.engine.memory.hardware import Hardware
    from mtpress.engine.memory.served_model import ServedModel
    from mtpress.engine.server.client import Client

NUM_CANDIDATES = 20  # as many as vLLM gives
ACCEPTANCE_FLOOR = 0.5
MAX_MODEL_LEN, MAX_NUM_SEQS = 4096, 4
NUM_DRAFTS = 3  # what the seeds serve with, and as many positions as their cards report
TOKEN_ID = "token_id:"

Candidates = Mapping[int, float]  # token id → log-probability


@dataclass(frozen=True)
class Answer:
    """What a canary was answered. said: the text, or the tool calls, or what the server refused it with."""

    canary: Canary
    said: str
    right: bool

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.canary.kind, "question": self.canary.question, "said": self.said, "right": self.right}


@dataclass(frozen=True)
class Story:
    """A greedy text: its tokens, the likeliest candidates at each, and (scored) those of its tokens read back as a prompt."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    candidates: tuple[Candidates, ...]


@dataclass(frozen=True)
class Run:
    """One start of the engine. refusal: why it did not come up, or why it stopped; then the rest is what was seen before."""

    num_speculative_tokens: int
    refusal: str | None = None
    answers: tuple[Answer, ...] = ()
    stories: tuple[Story, ...] = ()
    spec_decode: SpecDecode | None = None
    scores: tuple[tuple[Candidates, ...], ...] = ()

    def num_right(self, kind: str) -> int:
        return sum(answer.right for answer in self.answers if answer.canary.kind == kind)

    def num_asked(self, kind: str) -> int:
        return sum(answer.canary.kind == kind for answer in self.answers)

    def as_json(self) -> dict[str, Any]:
        asked = {kind: [self.num_right(kind), self.num_asked(kind)] for kind in ("text", "picture", "tool") if self.num_asked(kind)}
        return {
            "num_speculative_tokens": self.num_speculative_tokens,
            "refusal": self.refusal,
            "right_of_asked": asked,
            "wrong": [answer.as_json() for answer in self.answers if not answer.right],
            "draft_head": self.spec_decode.as_json() if self.spec_decode else None,
        }


@dataclass(frozen=True)
class Difference:
    """Where greedy text with drafts first leaves the text without, and by how much each run prefers its own token, in nats."""

    story: int
    position: int
    margin: float


@dataclass(frozen=True)
class Closeness:
    """Logits of the checkpoint against the base's on the same tokens."""

    num_tokens: int
    mean_kl: float
    largest_kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Trial:
    """Everything that was seen. drafted is None where config.json promises no draft head; base where none was asked for."""

    engine: str
    format: str
    drafted: Run | None
    plain: Run
    base: Run | None = None
    base_refusal: str | None = None
    acceptance_floor: float = ACCEPTANCE_FLOOR
    differences: tuple[Difference, ...] = ()
    num_stories_compared: int = 0
    closeness: Closeness | None = None
    logs: Path | None = field(default=None, compare=False)

    @property
    def answering(self) -> Run:
        """The run whose answers count: with drafts, as it is served, where that came up."""
        return self.drafted if self.drafted is not None and self.drafted.answers else self.plain

    def as_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "with_drafts": self.drafted.as_json() if self.drafted else None,
            "without_drafts": self.plain.as_json(),
            "base": self.base.as_json() if self.base else None,
            "base_refusal": self.base_refusal,
            "num_stories_compared": self.num_stories_compared,
            "differences": [vars(difference) for difference in self.differences],
            "logits": vars(self.closeness) if self.closeness else None,
        }


def examine(
    model: "ServedModel",
    engine: "Engine",
    hardware: "Hardware",
    logs: Path,
    *,
    base: "ServedModel | None" = None,
    num_drafts: int = NUM_DRAFTS,
    acceptance_floor: float = ACCEPTANCE_FLOOR,
    say: Callable[[str], None] = lambda line: None,
) -> Trial:
    """Two starts of the engine, three with `base`. Whatever the engine does with the checkpoint is evidence, never an exception.

    logs: a directory for the engine's logs. InputError and ResourceError where the call cannot be served at all (memory, port).
    """
    wants_drafts = promises_drafts(model)
    drafted = None
    if wants_drafts:
        say(f"{model.name} with {num_drafts} drafts")
        drafted = run(model, engine, hardware, logs / "drafts.log", num_drafts, say)
    say(f"{model.name} without drafts")
    asked = drafted is None or drafted.refusal is not None  # otherwise the answers are known already
    plain = run(model, engine, hardware, logs / "plain.log", 0, say, with_answers=asked, score_own=base is not None)
    based, refusal = None, None
    if base is not None:
        say(f"{base.name}, the base")
        try:
            drafts = num_drafts if promises_drafts(base) else 0
            based = run(base, engine, hardware, logs / "base.log", drafts, say, score=plain.stories)
        except (ResourceError, InputError) as error:  # it may be three times as large
            refusal = str(error)
    differing: tuple[Difference, ...] = ()
    compared = 0
    if drafted is not None and drafted.stories and plain.stories:
        differing = tuple(differences(plain.stories, drafted.stories))
        compared = min(len(plain.stories), len(drafted.stories))
    close = closeness(based.scores, plain.scores) if based is not None and based.scores and plain.scores else None
    return Trial(
        engine=f"vLLM {engine.version} ({engine.platform})",
        format=model.format,
        drafted=drafted,
        plain=plain,
        base=based,
        base_refusal=refusal,
        acceptance_floor=acceptance_floor,
        differences=differing,
        num_stories_compared=compared,
        closeness=close,
        logs=logs,
    )


def promises_drafts(model: "ServedModel") -> bool:
    """Whether config.json has a draft head, stored or not: a user who asks the engine for drafts gets what is there."""
    from mtpress.models.qwen3_5 import names as qwen3_5

    return model.num_mtp_layers > 0 or qwen3_5.num_mtp_layers(model.config) > 0


def run(
    model: "ServedModel",
    engine: "Engine",
    hardware: "Hardware",
    log: Path,
    num_drafts: int,
    say: Callable[[str], None],
    *,
    with_answers: bool = True,
    score_own: bool = False,
    score: Sequence[Story] = (),
) -> Run:
    """One start. score_own: read its own stories back; score: read these."""
    from mtpress.engine.launch.launch import compose
    from mtpress.engine.server.server import Server

    # mtpress itself asks for no drafts where no head is stored; here the engine is asked all the same.
    headless = num_drafts > 0 and not model.num_mtp_layers
    extra = ["--speculative-config", f'{{"method": "mtp", "num_speculative_tokens": {num_drafts}}}'] if headless else []
    launch = compose(
        model, engine, hardware,
        num_speculative_tokens=num_drafts if model.num_mtp_layers else 0,
        max_model_len=min(MAX_MODEL_LEN, model.max_position_embeddings or MAX_MODEL_LEN),
        max_num_seqs=MAX_NUM_SEQS,
        enable_weights_track=not model.lacks_input_scales,
        extra=extra,
    )  # fmt: skip
    answers: list[Answer] = []
    stories: list[Story] = []
    scores: list[tuple[Candidates, ...]] = []
    counted: SpecDecode | None = None
    refusal: str | None = None
    try:
        with Server(launch, log, say=say) as server:
            client = server.client
            if with_answers:
                answers.extend(ask(client, canary) for canary in canaries(pictures=model.has_vision and not launch.language_model_only))
            before = client.metrics().spec_decode
            stories.extend(tell(client, canary) for canary in story_canaries())
            after = client.metrics().spec_decode
            if before is not None and after is not None:
                counted = after - before
            scores.extend(read_back(client, story) for story in ([*stories] if score_own else score))
    except EngineError as error:
        refusal = str(error)
    return Run(num_drafts, refusal, tuple(answers), tuple(stories), counted, tuple(scores))


def canaries(pictures: bool) -> Iterator[Canary]:
    yield from text_canaries()
    yield from tool_canaries()
    if pictures:
        yield from picture_canaries()


def ask(client: "Client", canary: Canary) -> Answer:
    """One canary; a server that refuses the request has given a wrong answer, one that dies raises EngineError."""
    try:
        message = client.chat(canary.messages, **canary.body())["choices"][0]["message"]
    except InputError as error:
        return Answer(canary, str(error), False)
    calls = [call.get("function") for call in message.get("tool_calls") or []]
    return Answer(canary, str(calls) if calls else str(message.get("content")), is_right(canary, message))


def tell(client: "Client", canary: Canary) -> Story:
    """One greedy text with the candidates at each token."""
    asked = {"logprobs": True, "top_logprobs": NUM_CANDIDATES, "return_token_ids": True, "return_tokens_as_token_ids": True}
    try:
        answer = client.chat(canary.messages, **canary.body(), **asked)
        choice = answer["choices"][0]
        entries = choice["logprobs"]["content"]
        candidates = tuple({_token(c["token"]): float(c["logprob"]) for c in entry["top_logprobs"]} for entry in entries)
        return Story(tuple(answer["prompt_token_ids"]), tuple(choice["token_ids"]), candidates)
    except (KeyError, TypeError, ValueError, InputError) as error:
        raise EngineError(f"the server gives no log-probabilities by token id ({error}); a vLLM from 0.11 on does") from None


def read_back(client: "Client", story: Story) -> tuple[Candidates, ...]:
    """The candidates at each of the story's tokens when it is read as a prompt."""
    tokens = [*story.prompt_token_ids, *story.token_ids]
    try:
        answer = client.complete(tokens, temperature=0.0, max_tokens=1, prompt_logprobs=NUM_CANDIDATES)
        entries = answer["choices"][0]["prompt_logprobs"]
        ranked = entries[len(story.prompt_token_ids) :]
        return tuple({int(token): float(entry["logprob"]) for token, entry in at.items()} for at in ranked)
    except (KeyError, TypeError, ValueError, AttributeError, MtpressError) as error:
        raise EngineError(f"the server gives no log-probabilities of a prompt ({error})") from None


def differences(plain: Sequence[Story], drafted: Sequence[Story]) -> Iterator[Difference]:
    """One for each story whose tokens differ. margin: the larger of the two runs' preferences; infinite where a candidate is far off."""
    for number, (a, b) in enumerate(zip(plain, drafted, strict=False)):  # an engine that died told fewer
        pairs = zip(a.token_ids, b.token_ids, strict=False)
        position = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        if position is None:
            if len(a.token_ids) != len(b.token_ids):
                yield Difference(number, min(len(a.token_ids), len(b.token_ids)), math.inf)
            continue
        x, y = a.token_ids[position], b.token_ids[position]
        first, second = a.candidates[position], b.candidates[position]
        margins = (first.get(x, -math.inf) - first.get(y, -math.inf), second.get(y, -math.inf) - second.get(x, -math.inf))
        yield Difference(number, position, max((m for m in margins if not math.isnan(m)), default=math.inf))


def closeness(base: Sequence[Sequence[Candidates]], own: Sequence[Sequence[Candidates]]) -> Closeness | None:
    """KL and agreement over every token of the stories that both have read; None where that is none."""
    kls, agreed = [], 0
    for theirs, ours in zip(base, own, strict=False):  # an engine that died read fewer
        for p, q in zip(theirs, ours, strict=True):
            # vLLM adds the prompt's own token, likely or not: the last of the likeliest is the smallest of the others
            floor = min(q.values())
            kls.append(max(0.0, sum(math.exp(lp) * (lp - q.get(token, floor)) for token, lp in p.items())))
            agreed += max(p, key=lambda token: p[token]) == max(q, key=lambda token: q[token])
    return Closeness(len(kls), sum(kls) / len(kls), max(kls), agreed / len(kls)) if kls else None


def _token(name: str) -> int:
    return int(name.removeprefix(TOKEN_ID))
