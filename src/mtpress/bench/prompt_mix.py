"""The prompts of a benchmark: the shipped mix, a file of the user's own, or random tokens.

In: a name or a file of JSON lines, {"kind": ..., "messages": [...]}, the format of calibration files. Out: a `PromptMix`, and
whether the longest prompt and decode fit a context. Leaves out: sending them.

The shipped mix holds requests as people write them: chat, code, maths, summary, tools, one after the other, so that the
first five prompts of a cell are one of each kind. Each asks for an answer of several hundred tokens, for text that a model
writes past its own end is no text that anyone reads, and a draft head guesses it differently.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mtpress.builtin import BUILTIN_DIR
from mtpress.chat.messages import normalize_messages
from mtpress.chat.tokenizer_trial import refuse_hostile
from mtpress.errors import InputError

MIX_FILE = BUILTIN_DIR / "prompts.jsonl"
MIX, RANDOM = "mix", "random"
TEMPLATE_TOKENS = 64  # what a chat template puts around one message, generously; Qwen3.5's own puts 10 to 20
NO_ACCEPTANCE = "random tokens have no next token that a draft head could know, so acceptance on them says nothing"


@dataclass(frozen=True)
class Prompt:
    kind: str
    messages: tuple[dict[str, Any], ...]

    @property
    def text(self) -> str:
        return "\n".join(str(message["content"]) for message in self.messages)


@dataclass(frozen=True)
class PromptMix:
    """source: what to call it. sha256: of the prompts as they are sent. num_left_out: rows of the file that cannot be sent as chat:
    plain texts, pictures, tool definitions."""

    source: str
    kind: Literal["mix", "file", "random"]
    prompts: tuple[Prompt, ...] = ()
    num_left_out: int = 0

    @property
    def sha256(self) -> str:
        return hashlib.sha256("".join(_line(prompt) for prompt in self.prompts).encode()).hexdigest()

    def write(self, path: Path) -> None:
        """The file that `vllm bench serve --dataset-name custom` reads; messages are sent as they are."""
        path.write_text("".join(_line(prompt) for prompt in self.prompts), encoding="utf-8")

    def longest_tokens(self, tokenizer_file: Path) -> int:
        """Tokens of the longest prompt with its template, rather too many than too few; InputError if there is no tokenizer."""
        tokenizer = _tokenizer(tokenizer_file)
        return max(len(tokenizer.encode(p.text, add_special_tokens=False).ids) + TEMPLATE_TOKENS * len(p.messages) for p in self.prompts)


@cache
def _tokenizer(file: Path) -> Any:
    """Read once for all configurations of a checkpoint; some 13 MB of JSON."""
    from tokenizers import Tokenizer

    refuse_hostile(file.parent)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(f"{file}: no tokenizer can be read from it ({str(error)[:100]})") from None


def _line(prompt: Prompt) -> str:
    first = prompt.messages[0]
    alone = len(prompt.messages) == 1 and first["role"] == "user" and isinstance(first["content"], str)
    return json.dumps({"prompt": first["content"] if alone else list(prompt.messages)}, ensure_ascii=False) + "\n"


def load_prompts(name: str) -> PromptMix:
    """ "mix", "random", or a file of JSON lines; InputError where it holds nothing that can be asked."""
    if name == RANDOM:
        return PromptMix("random tokens", "random")
    path = MIX_FILE if name == MIX else Path(name)
    if name != MIX and not path.exists():
        raise InputError(f"{name}: no such file; --prompts takes a file of JSON lines, {MIX} (the shipped one) or {RANDOM}")
    from mtpress.calibration.samples import read_jsonl

    rows = list(read_jsonl(path))
    prompts = tuple(prompt for where, row in rows if (prompt := _prompt(row, where)) is not None)
    if not prompts:
        raise InputError(f'{path}: has no row that can be asked; write lines like {{"messages": [{{"role": "user", "content": "..."}}]}}')
    if name == MIX:
        return PromptMix(f"mtpress's mix of {len(prompts)} prompts (chat, code, maths, summary, tools)", "mix", prompts)
    return PromptMix(f"{path.name}, {len(prompts)} prompts", "file", prompts, len(rows) - len(prompts))


def _prompt(row: dict[str, Any], where: str) -> Prompt | None:
    """A row up to its last user turn, so that the model answers that; None where plain chat cannot say it."""
    messages = row.get("messages")
    if not messages or row.get("tools"):
        return None
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    kept = messages[: asked[-1] + 1] if asked else []
    if not kept or not all(isinstance(m.get("content"), str) and m["role"] != "tool" and not m.get("tool_calls") for m in kept):
        return None
    normal = normalize_messages(kept, where=where)
    return Prompt(str(row.get("kind", "")), tuple({"role": m["role"], "content": m["content"]} for m in normal))
