"""Rules on tokenizer, chat template and generation defaults: what a server needs beside the weights."""

from collections import Counter
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
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
END, TEXT_END = "<|im_end|>", "<|endoftext|>"
# What every tokenizer of the family adds to its vocabulary, in the order of the ids; Qwen's from 248044.
SPECIALS = (
    TEXT_END, "<|im_start|>", END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>",
    "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
    "<tool_response>", "</tool_response>", "<think>", "</think>", "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>",
    "<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>",
)  # fmt: skip
LEAST_TEMPERATURE = 0.01  # vLLM's; what is lower is greedy, or nearly so
MANY_SPECIALS, NUM_USED = 20, 26  # a tokenizer with as many is of the family; sound and speech, behind the first 26, nothing here reads
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


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
        found = _added(subject.json(TOKENIZER))
    return found


def marks(subject: Subject) -> tuple[tuple[str, str], ...]:
    """What a server tells a template of the tokenizer, key and token: eos_token and the like, where tokenizer_config.json names them."""
    return named_tokens(subject.json(TOKENIZER_CONFIG) or {})


def named_tokens(content: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The same of a tokenizer_config.json."""
    said = {key: content.get(key) for key in NAMED}
    tokens = {key: value.get("content") if isinstance(value, dict) else value for key, value in said.items()}
    return tuple((key, token) for key, token in tokens.items() if isinstance(token, str))


def _added(content: dict[str, Any] | None) -> dict[str, int]:
    """The added tokens of tokenizer.json."""
    added = (content or {}).get("added_tokens")
    tokens = [token for token in (added if isinstance(added, list) else []) if isinstance(token, dict)]
    return {t["content"]: t["id"] for t in tokens if isinstance(t.get("content"), str) and type(t.get("id")) is int}


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
