"""What a tokenizer makes of text, whichever library saved it.

In: tokenizer.json, vocab.json, merges.txt and tokenizer_config.json of a checkpoint and of its source. Out: a `Difference` for every
part of them that makes other tokens; one of the topic "tokenizer-spelling" for files whose bytes differ and whose meaning does not.
Leaves out: running a tokenizer.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mtpress.comparison.difference import Difference, differing, is_empty, same
from mtpress.json_files import shown
from mtpress.quant_config.tokenizer_files import TOKENIZER, TOKENIZER_CONFIG

VOCAB, MERGES = "vocab.json", "merges.txt"
MODEL_DEFAULTS = {"type": "BPE"}
ADDED_KEYS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Keys of tokenizer_config.json by which tokens change; the rest is bookkeeping, or a template, which has rules of its own.
CONFIG_KEYS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens", "do_lower_case", "bos_token", "eos_token", "pad_token",
    "unk_token", "auto_map", "truncation_side", "padding_side", "legacy", "image_token", "video_token", "vision_bos_token",
    "vision_eos_token",
)  # fmt: skip
CONFIG_DEFAULTS = {"truncation_side": "right", "padding_side": "right"}
# Classes of one tokenizer: with and without Rust, and what transformers 5 calls both.
CLASSES = {"Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast"}
Read = Callable[[str], Mapping[str, Any] | None]
ReadText = Callable[[str], str | None]


def _merges(said: Any) -> list[tuple[str, ...]]:
    """Merges as pairs: tokenizers writes pairs since 0.20, strings with a space before."""
    found = []
    for entry in said if isinstance(said, list) else []:
        parts = entry.split(" ") if isinstance(entry, str) else entry
        found.append(tuple(map(str, parts)) if isinstance(parts, list) else (str(parts),))
    return found


def _added(content: Mapping[str, Any]) -> dict[str, Any]:
    """Token → its id and how it is found in text."""
    found = {}
    for token in content.get("added_tokens") or []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            found[token["content"]] = [token.get("id"), *(bool(token.get(key)) for key in ADDED_KEYS)]
    return found


def token_ids(content: Mapping[str, Any]) -> dict[str, int]:
    """Token → id of a tokenizer.json, added tokens among them."""
    vocab, _, added, _ = _parts(content)
    ids = vocab | {token: said[0] for token, said in added.items()}
    return {token: number for token, number in ids.items() if type(number) is int}


def _parts(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, ...]], dict[str, Any], dict[str, Any]]:
    """(vocabulary, merges, added tokens, everything else) of a tokenizer.json."""
    model = content.get("model")
    model = dict(model) if isinstance(model, Mapping) else {}
    vocab, merges = model.pop("vocab", {}), _merges(model.pop("merges", []))
    rest = {key: value for key, value in content.items() if key not in ("version", "added_tokens", "model")}
    rest |= {f"model.{key}": value for key, value in model.items()}
    return vocab if isinstance(vocab, dict) else {}, merges, _added(content), rest


def _pruned(value: Any) -> Any:
    """A step of a tokenizer without what says nothing, so that a null and a missing key are equal."""
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value


def _of_json(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None, bool]]:
    """(part, what it is here, what it is there, whether it only adds tokens) of two tokenizer.json that make other tokens."""
    (vocab, merges, added, rest), (their_vocab, their_merges, their_added, their_rest) = _parts(here), _parts(there)
    # a library may write added tokens into the vocabulary too
    vocab = {token: number for token, number in vocab.items() if token not in added}
    their_vocab = {token: number for token, number in their_vocab.items() if token not in their_added}
    moved = [token for token in their_vocab if vocab.get(token) != their_vocab[token]]
    new = [token for token in vocab if token not in their_vocab]
    if moved or new:
        first = (moved or new)[0]
        yield (
            f"vocabulary, {len(moved)} of {len(their_vocab)} tokens moved or gone and {len(new)} new, as",
            f"{shown(first)} at {vocab.get(first, 'no id')}", f"{shown(first)} at {their_vocab.get(first, 'no id')}", not moved,
        )  # fmt: skip
    if merges != their_merges:
        place = next((i for i, (one, other) in enumerate(zip(merges, their_merges, strict=False)) if one != other), None)
        said = (len(merges), len(their_merges)) if place is None else (merges[place], their_merges[place])
        more = place is None and len(merges) > len(their_merges)
        yield f"merges{'' if place is None else f', number {place}'}", shown(said[0]), shown(said[1]), more
    for token, ours, theirs in differing(added, their_added, {}, ()):
        yield (
            f"added token {shown(token)}",
            None if ours is None else shown(ours),
            None if theirs is None else shown(theirs),
            theirs is None,
        )
    for key, ours, theirs in differing(_pruned(rest), _pruned(their_rest), {"model.type": "BPE"}, ()):
        yield key, None if ours is None else shown(ours), None if theirs is None else shown(theirs), False


def _of_files(text: ReadText, base: ReadText) -> Iterator[tuple[str, str | None, str | None]]:
    """The same of vocab.json and merges.txt, which tokenizers without Rust read."""
    vocab, their_vocab = (_json(read(VOCAB)) for read in (text, base))
    if vocab is not None and their_vocab is not None and not same(vocab, their_vocab):
        yield VOCAB, f"{len(vocab)} tokens", f"{len(their_vocab)} tokens"
    merges, their_merges = ([line for line in (read(MERGES) or "").split("\n") if line and not line.startswith("#version")]
                            for read in (text, base))  # fmt: skip
    if merges and their_merges and merges != their_merges:
        yield MERGES, f"{len(merges)} merges", f"{len(their_merges)} merges"


def _json(text: str | None) -> dict[str, Any] | None:
    try:
        content = json.loads(text) if text is not None else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _content(value: Any) -> Any:
    """A special token is written as a string, or as an object with its flags."""
    return value.get("content") if isinstance(value, Mapping) and "content" in value else value


def _of_config(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None]]:
    ours, theirs = ({key: _content(config[key]) for key in CONFIG_KEYS if key in config} for config in (here, there))
    for key, one, other in differing(ours, theirs, CONFIG_DEFAULTS, ()):
        if key.endswith("_token") and not key.startswith("add_") and (is_empty(one) or is_empty(other)):
            continue  # a marker that one of the files does not name is read from elsewhere
        yield key, None if one is None else shown(one), None if other is None else shown(other)
    classes = [config.get("tokenizer_class") for config in (here, there)]
    if None not in classes and classes[0] != classes[1] and not set(map(str, classes)) <= CLASSES:
        yield "tokenizer_class", shown(classes[0]), shown(classes[1])
    listed, wanted = (_listed(config) for config in (here, there))
    for number, one, other in differing(listed, wanted, {}, ()) if listed and wanted else ():
        yield f"added_tokens_decoder.{number}", None if one is None else shown(one), None if other is None else shown(other)


def _listed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Id → the added token that tokenizer_config.json lists for it."""
    listed = config.get("added_tokens_decoder")
    return {str(number): _content(token) for number, token in listed.items()} if isinstance(listed, Mapping) else {}


def differences(read: Read, text: ReadText, base: Read, base_text: ReadText) -> Iterator[Difference]:
    """read, text: a file of the checkpoint by its name, as JSON and as it is; base, base_text: the same of the source."""
    respelled = text(TOKENIZER) != base_text(TOKENIZER)
    here, there = (read(TOKENIZER), base(TOKENIZER)) if respelled else (None, None)
    if here is not None and there is not None:
        found = [
            Difference("tokenizer", TOKENIZER, f"{TOKENIZER}: {part}", one, other, added)
            for part, one, other, added in _of_json(here, there)
        ]
        yield from found
        if not found:
            yield Difference("tokenizer-spelling", TOKENIZER, TOKENIZER, None, None)
    for file, one, other in _of_files(text, base_text):
        yield Difference("tokenizer", file, file, one, other)
    config, theirs = read(TOKENIZER_CONFIG), base(TOKENIZER_CONFIG)
    if config is not None and theirs is not None:
        for key, one, other in _of_config(config, theirs):
            yield Difference("tokenizer", TOKENIZER_CONFIG, f"{TOKENIZER_CONFIG}: {key}", one, other)
