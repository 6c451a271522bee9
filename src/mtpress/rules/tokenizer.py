"""Rules on tokenizer, chat template and generation defaults: what a server needs beside the weights."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mtpress.quant_config.tokenizer_files import (
    CONFIG_IDS,
    END,
    GENERATION,
    GENERATION_IDS,
    LEAST_TEMPERATURE,
    MANY_SPECIALS,
    NUM_USED,
    SPECIALS,
    TEMPLATES,
    TEXT_END,
    TOKENIZER,
    TOKENIZER_CONFIG,
    _added,
    _vocabulary,
    marks,
    token_ids,
)
from mtpress.quant_config.view import CONFIG, Subject
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count

COPY = "copy it from the source: mtpress repair CKPT OUT --base SRC"


def tokenizer_missing(subject: Subject) -> Iterator[Problem]:
    if not subject.has(TOKENIZER) and not (subject.has("vocab.json") and subject.has("merges.txt")):
        yield Problem(f"no {TOKENIZER}", (TOKENIZER,))


def tokenizer_config_missing(subject: Subject) -> Iterator[Problem]:
    if not subject.has(TOKENIZER_CONFIG):
        yield Problem(f"no {TOKENIZER_CONFIG}", (TOKENIZER_CONFIG,))


def tokenizer_backend(subject: Subject) -> Iterator[Problem]:
    content = subject.json(TOKENIZER_CONFIG) or {}
    odd = ["the key `backend`"] if "backend" in content else []
    if content.get("tokenizer_class") == "TokenizersBackend":
        odd.append("the class TokenizersBackend")
    if odd:
        yield Problem(f"{TOKENIZER_CONFIG}: holds {' and '.join(odd)}, which only transformers 5 knows", (TOKENIZER_CONFIG,))


def template_missing(subject: Subject) -> Iterator[Problem]:
    inside = (subject.json(TOKENIZER_CONFIG) or {}).get("chat_template")
    if not inside and not any(subject.has(name) for name in TEMPLATES):
        yield Problem(f"no {TEMPLATES[0]}, and no chat_template in {TOKENIZER_CONFIG}", TEMPLATES[:1])


def generation_config_missing(subject: Subject) -> Iterator[Problem]:
    if not subject.has(GENERATION):
        yield Problem(f"no {GENERATION}", (GENERATION,))


def token_id_outside(subject: Subject) -> Iterator[Problem]:
    if subject.vocab_size is None:
        return
    said: dict[str, Any] = {f"config.json {key}": subject.config.get(key) for key in CONFIG_IDS}
    for name, level in ((CONFIG, subject.model.text_config(subject.config)), (GENERATION, subject.json(GENERATION) or {})):
        said |= {f"{name} {key}": level.get(key) for key in GENERATION_IDS}
    largest = max((i for i in _vocabulary(subject.json(TOKENIZER)).values() if type(i) is int), default=None)
    said[f"{TOKENIZER} largest id"] = max([i for i in (largest, *token_ids(subject).values()) if i is not None], default=None)
    outside = []
    for where, ids in said.items():
        for number in ids if isinstance(ids, list) else [ids]:
            if type(number) is int and not 0 <= number < subject.vocab_size:
                outside.append(f"{where}: {number}")
    if outside:
        yield Problem(f"{count(len(outside), 'token id')} outside the vocabulary of {subject.vocab_size}: {'; '.join(outside)}", (CONFIG,))


def token_id_differs(subject: Subject) -> Iterator[Problem]:
    known = token_ids(subject)
    if not known or not subject.is_vl:
        return
    wrong = []
    for key, token in CONFIG_IDS.items():
        said = subject.config.get(key)
        if said is not None and said != known.get(token):
            wrong.append(f"{key} is {said}, the tokenizer has {token} at {known.get(token, 'no id')}")
    if wrong:
        yield Problem(f"config.json: {'; '.join(wrong)}", (CONFIG,))


def special_tokens(subject: Subject) -> Iterator[Problem]:
    content = subject.json(TOKENIZER)
    said = _added(content) | token_ids(subject) | _vocabulary(content)
    known = {token: number for token in SPECIALS if type(number := said.get(token)) is int}
    there = list(known)
    if len(there) < MANY_SPECIALS:
        return
    first = Counter(known[token] - SPECIALS.index(token) for token in there).most_common(1)[0][0]
    places = {token: first + number for number, token in enumerate(SPECIALS)}
    wrong = [f"{token} at {known[token]}, not {places[token]}" for token in there if known[token] != places[token]]
    wrong += [f"no {token}, which has {places[token]}" for token in SPECIALS[:NUM_USED] if token not in there]
    if wrong:
        yield Problem(
            f"{count(len(wrong), 'special token')} not where the family has them: {'; '.join(wrong)}", (TOKENIZER, TOKENIZER_CONFIG)
        )


def pad_id(subject: Subject) -> int | None:
    """The id of tokenizer_config.json's pad_token."""
    said = (subject.json(TOKENIZER_CONFIG) or {}).get("pad_token")
    token = said.get("content") if isinstance(said, dict) else said
    return token_ids(subject).get(token) if isinstance(token, str) else None


def turn_end(subject: Subject) -> str:
    """The token that ends a turn: the family's, or a fine-tune's own that its tokenizer_config.json names as eos_token."""
    named = dict(marks(subject)).get("eos_token")
    return named if named is not None and named != TEXT_END and named in token_ids(subject) else END


def generation_ids(subject: Subject) -> Iterator[Problem]:
    """What ends a turn and what pads, by generation_config.json. Ids outside the vocabulary are token-id-outside's."""
    content, known, end = subject.json(GENERATION), token_ids(subject), turn_end(subject)
    if content is None or end not in known:
        return
    said, pad = content.get("eos_token_id"), content.get("pad_token_id")
    ends = said if isinstance(said, list) else [said]
    if subject.vocab_size is None or any(type(number) is int and not 0 <= number < subject.vocab_size for number in (*ends, pad)):
        return
    if known[end] not in ends:
        yield Problem(f"{GENERATION}: eos_token_id is {said}, without {known[end]}, the {end} that ends a turn", (GENERATION,))
    right = pad_id(subject)
    if type(pad) is int and right is not None and pad != right:
        yield Problem(f"{GENERATION}: pad_token_id is {pad}, the tokenizer pads with {right}", (GENERATION,))


def greedy_keys(content: dict[str, Any]) -> list[str]:
    """What of a generation_config.json makes decoding greedy."""
    temperature = content.get("temperature")
    cold = isinstance(temperature, int | float) and type(temperature) is not bool and temperature < LEAST_TEMPERATURE
    found = [f"temperature {temperature}"] if cold else []
    return found + ["do_sample false"] * (content.get("do_sample") is False) + ["top_k 1"] * (content.get("top_k") == 1)


def generation_greedy(subject: Subject) -> Iterator[Problem]:
    if greedy := greedy_keys(subject.json(GENERATION) or {}):
        yield Problem(f"{GENERATION}: {', '.join(greedy)}", (GENERATION,))


RULES = (
    Rule("tokenizer-missing", "error", "There is no tokenizer: no server starts.", COPY, tokenizer_missing),
    Rule(
        "tokenizer-config-missing",
        "error",
        "There is no tokenizer_config.json: the engine guesses the class and does not know which token ends a turn.",
        COPY,
        tokenizer_config_missing,
    ),
    Rule(
        "tokenizer-backend",
        "warning",
        "tokenizer_config.json holds what transformers 5 adds on saving (`backend`, TokenizersBackend); transformers 4 stops on it.",
        "mtpress repair CKPT OUT takes it out",
        tokenizer_backend,
    ),
    Rule(
        "template-missing",
        "warning",
        "There is no chat template: the server answers every chat request with an error.",
        COPY,
        template_missing,
    ),
    Rule(
        "generation-config-missing",
        "warning",
        "There is no generation_config.json: the server falls back to its own sampling and to one end token.",
        COPY,
        generation_config_missing,
    ),
    Rule(
        "token-id-outside",
        "error",
        "A token id of the tokenizer or of a config is not below vocab_size: the embedding has no row for it.",
        "tokenizer and weights are not of one model; " + COPY,
        token_id_outside,
    ),
    Rule(
        "token-id-differs",
        "error",
        "config.json and tokenizer disagree on the id of a picture or video token: pictures are put in the wrong place, or nowhere.",
        "tokenizer and config are not of one model; " + COPY,
        token_id_differs,
    ),
    Rule(
        "special-tokens",
        "error",
        "The tokenizer lacks a special token of the family, or has it at another id: what it marks is read letter by letter, or as another "
        "mark than in training.",
        "tokenizer and weights are not of one model; " + COPY,
        special_tokens,
    ),
    Rule(
        "generation-ids",
        "warning",
        "generation_config.json does not name the token that ends a turn, so answers run on in engines that go by it; or pads with another "
        "token than the tokenizer.",
        "mtpress repair CKPT OUT sets them to the tokenizer's",
        generation_ids,
    ),
    Rule(
        "generation-greedy",
        "warning",
        "generation_config.json makes greedy decoding the default: models of this family go on repeating themselves under it.",
        "mtpress repair CKPT OUT --base SRC, or set the sampling by the recipe's generation_config",
        generation_greedy,
    ),
)
