"""Whose chat template a checkpoint has: ours, an official one, one that speaks as those do, the author's own, or none that works.

In: the text of a template. Out: its `Origin`. Leaves out: where templates lie (rules/template.py) and rendering (chat/conformance.py).

The official templates are not shipped here. Their texts are known by hash, and their format by what they make of a few conversations.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from mtpress.chat.conformance import tried
from mtpress.chat.template import template

# SHA-256 of the texts without white space at their end, as TRL 1.16.0 ships them; tests/oracles/test_templates.py reads them there.
OFFICIAL = {
    "273d8e0e683b885071fb17e08d71e5f2a5ddfb5309756181681de4f5a1822d80": "Qwen3.5, thinking off",
    "a4aee8afcf2e0711942cf848899be66016f8d14a889ff9ede07bca099c28f715": "Qwen3.5",
    "e84f32a23fdda27689f868aa4a1a5621f41133e51a48d7f3efcbea2839574259": "Qwen3.6",
    "c3cf9e34abf4f9e36c2d72165aa9c132d3e2a725b6c2586aaa3a8af9d7a81041": "Qwen3.8",
}


@dataclass(frozen=True)
class Origin:
    """kind: ours, official, official-like (the same format, another text), own (another system prompt or format), broken (it refuses or
    loses what everybody sends), none. what: in words, for "own" and "broken" the first conversation that shows it."""

    kind: Literal["none", "ours", "official", "official-like", "own", "broken"]
    what: str


def origin(text: str | None, pictures: bool = True, tokens: tuple[tuple[str, str], ...] = ()) -> Origin:
    """Of a template's text; None: there is a file, and no template in it. pictures, tokens: as for `tried`."""
    if text is None:
        return Origin("broken", "it is no text in UTF-8")
    if text.rstrip() == template().rstrip():
        return Origin("ours", "mtpress's own")
    if (title := OFFICIAL.get(hashlib.sha256(text.rstrip().encode(errors="surrogatepass")).hexdigest())) is not None:
        return Origin("official", f"the official one of {title}")
    trial = tried(text, pictures, tokens)
    if trial.cripples:
        return Origin("broken", f"it fails in {trial.cripples[0].title} ({trial.cripples[0].what})")
    if trial.foreign:
        return Origin("own", f"it writes {trial.foreign[0].title} otherwise than the official ones ({trial.foreign[0].what})")
    return Origin("official-like", "in the official format, with another text")
