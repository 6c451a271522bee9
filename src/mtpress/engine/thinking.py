"""What a checkpoint's chat template does when a request does not say whether to think.

In: a checkpoint's directory. Out: a `Template`. Leaves out: everything else that a template does. It is rendered in
Jinja's sandbox with one question, which is what an engine does with every request.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from mtpress.checkpoint import read_json_object
from mtpress.errors import InputError

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
    """The template beside the weights, else the one in tokenizer_config.json, as vLLM looks for it."""
    file, source = FILE, _text(checkpoint / FILE)
    if source is None:
        file, inside = TOKENIZER_CONFIG, tokenizer_config(checkpoint).get("chat_template")
        source = inside if isinstance(inside, str) else None
    if source is None:
        return Template(None, None, False)
    return Template(file, _default(source), ON_TAG in source)


def tokenizer_config(checkpoint: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where it cannot be read."""
    try:
        return read_json_object(checkpoint / TOKENIZER_CONFIG)
    except InputError:
        return {}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _default(source: str) -> Literal["on", "off"] | None:
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = refuse
    try:
        shown = environment.from_string(source).render(messages=[{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except Exception:  # a template is a program: whatever it raises, it says nothing of thinking
        return None
    last = shown.rstrip()
    if last.endswith("<think>"):
        return "on"
    return "off" if last.endswith("</think>") else None
