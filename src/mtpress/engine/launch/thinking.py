"""What a checkpoint's chat template does when a request does not say whether to think.

In: a checkpoint's directory. Out: a `Template`. Leaves out: everything else that a template does. It is rendered
with one question, which is what an engine does with every request, in a process of its own (chat/conformance.py).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtpress.checkpoint.json_files import read_json_object, read_text
from mtpress.errors import InputError
from mtpress.quant_config.tokenizer_files import named_tokens

FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
ON_TAG = "<|think_on|>"


@dataclass(frozen=True)
class Template:
    """file: where it stands, None where there is none; default: None where it has no such modes; tags: it knows <|think_on|>."""

    file: str | None
    default: Literal["on", "off"] | None
    tags: bool

    @property
    def switches(self) -> bool:
        """Whether a message can turn on what is off by default, as in ours: kwargs alone do not say then whether it thinks."""
        return self.default == "off" and self.tags


def read_template(checkpoint: Path) -> Template:
    """The template beside the weights, else the one in tokenizer_config.json, as vLLM looks for it.

    InputError for one that does not end or eats memory: every request would do that to the server.
    """
    file, source, config = FILE, _text(checkpoint / FILE), tokenizer_config(checkpoint)
    if source is None:
        file, inside = TOKENIZER_CONFIG, config.get("chat_template")
        source = inside if isinstance(inside, str) else None
    if source is None:
        return Template(None, None, False)
    tokens: dict[str, Any] = dict(named_tokens(config))
    return Template(file, _default(source, tokens, checkpoint / file), ON_TAG in source)


def tokenizer_config(checkpoint: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where it cannot be read."""
    try:
        return read_json_object(checkpoint / TOKENIZER_CONFIG)
    except InputError:
        return {}


def _text(path: Path) -> str | None:
    return read_text(path) if path.exists() else None


def _default(source: str, tokens: dict[str, Any], where: Path) -> Literal["on", "off"] | None:
    from mtpress.chat.conformance import RefusedError, rendered

    try:
        shown = rendered(source, [{"role": "user", "content": "Hello"}], where=str(where), add_generation_prompt=True, **tokens)
    except RefusedError:  # a template is a program: whatever it raises, it says nothing of thinking
        return None
    last = shown.rstrip()
    if last.endswith("<think>"):
        return "on"
    return "off" if last.endswith("</think>") else None
