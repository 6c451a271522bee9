"""Rules on tokenizer, chat template and generation defaults: what a server needs beside the weights."""

from collections.abc import Iterator
from typing import Any

from mtpress.rules.rule import Problem, Rule, count
from mtpress.rules.subject import CONFIG, Subject

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
COPY = "copy it from the source: mtpress repair CKPT OUT --base SRC"
# Keys of config.json that hold the id of one token, and the token.
CONFIG_IDS = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
GENERATION_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


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


def token_ids(subject: Subject) -> dict[str, int]:
    """Token → id of the added tokens, by tokenizer_config.json or, where that does not list them, tokenizer.json."""
    found: dict[str, int] = {}
    listed = (subject.json(TOKENIZER_CONFIG) or {}).get("added_tokens_decoder")
    if isinstance(listed, dict):
        for number, token in listed.items():
            if isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdigit():
                found[token["content"]] = int(number)
    if not found:
        added = (subject.json(TOKENIZER) or {}).get("added_tokens")
        for token in added if isinstance(added, list) else []:
            if isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int:
                found[token["content"]] = token["id"]
    return found


def _vocabulary(content: dict[str, Any] | None) -> dict[str, int]:
    model = (content or {}).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    return vocab if isinstance(vocab, dict) else {}


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
)
