"""The one face that prints: what a file, a path, a template or a server says is shown there, and never obeyed.

In: lines, tables, JSON. Out: text on a terminal, a pipe or a file, in which control characters, direction marks and other invisible ones
are spelled out (an escape as \\x1b) and rich's markup is text like any other. Leaves out: what is printed; live lines (progress.py,
engine/server/load_progress.py), which escape their words here.
"""

import json
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any, TextIO

from mtpress.json_files import json_string

if TYPE_CHECKING:
    from rich.console import Console


LEAST_WIDTH = 40  # COLUMNS=0 would print empty lines
# Controls of ASCII and Latin-1 but for the line feed; marks of direction and joining; other separators of lines; tags and the like.
INVISIBLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """The text with invisible characters spelled out. Line feeds stay: say() and tables know what to do with them."""
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, *, to: TextIO | None = None) -> None:
    """One line, to stdout or where it is said."""
    print(visible(text).replace("\n", "\\n"), file=to or sys.stdout, flush=True)


def console() -> "Console":
    """rich's console on stdout, whose strings (lines, cells, titles) are visible() and without markup. Styles are for Text and style=."""
    from rich.console import Console
    from rich.text import Text

    class Face(Console):
        def render_str(self, text: str, **how: Any) -> Text:
            return super().render_str(visible(text), **how)

    face = Face(markup=False, emoji=False, highlight=False)
    face.width = max(face.width, LEAST_WIDTH)
    return face


def quoted(token: str) -> str:
    """A word of a shell command; one with invisible characters as bash's $'…', which means the same."""
    if INVISIBLE.search(token) is None and "\n" not in token:
        return shlex.quote(token)
    spelled = visible(token.replace("\\", "\\\\").replace("'", "\\'")).replace("\n", "\\n")
    return f"$'{spelled}'"


def json_text(document: Any, indent: int | None = None) -> str:
    """A document as JSON that a terminal may be shown: the same document, invisible characters in JSON's own spelling."""
    text = json_string(document, indent=indent)
    return INVISIBLE.sub(lambda found: json.dumps(found[0])[1:-1], text)


def count(number: int, noun: str) -> str:
    """1 → "1 tensor", 3 → "3 tensors"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
