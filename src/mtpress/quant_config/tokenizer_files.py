"""Tokenizer, chat template and generation defaults as files: their names, the family's tokens, and what the files say of both."""

from typing import Any

from mtpress.quant_config.view import Subject

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
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


KEY = "chat_template"


def templates(subject: Subject) -> dict[str, str | None]:
    """File → the template that an engine finds there, in the order in which transformers and vLLM look; None where it is no text."""
    found: dict[str, str | None] = {}
    for name in TEMPLATES:
        if subject.has(name):
            found[name] = subject.text(name) if name.endswith(".jinja") else _text((subject.json(name) or {}).get(KEY))
    inside = (subject.json(TOKENIZER_CONFIG) or {}).get(KEY)
    if inside:
        found[TOKENIZER_CONFIG] = _text(inside)
    return found


def _text(content: object) -> str | None:
    """A template, or the one that is called "default" in a list of named ones."""
    if isinstance(content, list):
        named = [entry for entry in content if isinstance(entry, dict) and entry.get("name") == "default"]
        content = named[0].get("template") if named else None
    return content if isinstance(content, str) else None


HOLD_TEMPLATES = (TOKENIZER_CONFIG, "processor_config.json")  # JSON files with other content, in which an engine may find one
