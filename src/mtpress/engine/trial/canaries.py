"""Small questions with known answers, for a model behind a server: text, pictures, tool calls, and stories that run long.

In: nothing. Out: `Canary`s, and whether an answer is right. Leaves out: who asks (client.py) and what follows from the
answers (rules/engine.py). Everything is chosen so that the built-in model knows it as well as a 27B model does: counting words,
adding two numbers, naming a shape. A model that fails most of them is broken, one that passes may still be bad: `mtpress eval` measures.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mtpress.chat.messages import normalize_messages

Kind = Literal["text", "picture", "tool", "story"]

PLAIN = (
    ("What is the first word of: cat, dog, fox, owl", "cat"),
    ("What is the last word of: hen, pig, cow", "cow"),
    ("How many words are in this list: cat, dog, fox, owl, hen", "5"),
    ("Write a Python function that adds a and b.", "return a + b"),
)
SUMS = ((24, 31), (52, 17), (40, 38), (63, 25))
SHAPES = (("circle", "red"), ("square", "blue"), ("triangle", "green"), ("circle", "yellow"), ("square", "red"), ("triangle", "blue"))
COLORS = {"red": (214, 40, 40), "green": (38, 150, 60), "blue": (36, 70, 200), "yellow": (242, 208, 30)}
GROUND, SIDE = (120, 120, 120), 96
PICTURE_QUESTION = "Name the shape and its color."
STORY_REQUESTS = tuple(
    f"Tell me a story about {hero}, {friend} and a {color} {thing} in {town}."
    for hero, friend, color, thing, town in (
        ("Nora", "Ruby", "purple", "bag", "Selwin"),
        ("Finn", "Lena", "red", "kite", "Brook"),
        ("Hugo", "Ella", "green", "hat", "Tarn"),
        ("Rosa", "Max", "blue", "lamp", "Wick"),
        ("Ada", "Carl", "yellow", "cup", "Lorne"),
        ("Leo", "Jane", "black", "book", "Istra"),
        ("Ivy", "Otto", "white", "drum", "Arlen"),
        ("Sam", "Zoe", "orange", "coin", "Kelm"),
        ("Emil", "Rosa", "green", "bell", "Quill"),
        ("Jane", "Paul", "red", "clock", "Yarrow"),
        ("Otto", "Ada", "purple", "flute", "Velden"),
        ("Lena", "Hugo", "yellow", "rope", "Marsk"),
    )
)
STORY_TOKENS, ANSWER_TOKENS = 64, 48


@dataclass(frozen=True)
class Canary:
    """One request. right: words that must all be in the answer, in lower case; of a tool call its name and arguments; of a story none."""

    kind: Kind
    messages: tuple[Mapping[str, Any], ...]
    right: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    call: tuple[str, Mapping[str, Any]] | None = None

    @property
    def max_tokens(self) -> int:
        return STORY_TOKENS if self.kind == "story" else ANSWER_TOKENS

    @property
    def question(self) -> str:
        """The last line of what is asked, for people."""
        content = self.messages[-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        return str(text).rpartition("\n")[2]

    def body(self) -> dict[str, Any]:
        """What a chat request says beside model and messages: greedy, and no thinking, which would take the answer's tokens."""
        asked: dict[str, Any] = {
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        return asked | ({"tools": list(self.tools)} if self.tools else {})


def text_canaries() -> tuple[Canary, ...]:
    plain = (Canary("text", (_user(question),), (answer,)) for question, answer in PLAIN)
    sums = (Canary("text", (_user(f"What is {a} + {b}?"),), (str(a + b),)) for a, b in SUMS)
    return (*plain, *sums)


def picture_canaries() -> tuple[Canary, ...]:
    found = []
    for shape, color in SHAPES:
        url = f"data:image/png;base64,{base64.b64encode(draw(shape, color)).decode()}"
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PICTURE_QUESTION}]
        found.append(Canary("picture", (_user(content),), (shape, color)))
    return tuple(found)


def tool_canaries() -> tuple[Canary, ...]:
    weather = _tool("get_weather", "Get the weather in a town", town="string")
    food = _tool("buy", "Buy some food", food="string", count="integer")
    find = _tool("find_person", "Find where a person is", name="string")
    return (
        Canary("tool", (_user("What is the weather in Selwin?"),), tools=(food, weather), call=("get_weather", {"town": "Selwin"})),
        Canary("tool", (_user("What is the weather in Tarn?"),), tools=(find, weather), call=("get_weather", {"town": "Tarn"})),
        Canary("tool", (_user("Where is Ruby?"),), tools=(find, weather), call=("find_person", {"name": "Ruby"})),
    )


def story_canaries() -> tuple[Canary, ...]:
    """Long greedy texts: work for the draft head, and tokens to compare."""
    return tuple(Canary("story", (_user(request),)) for request in STORY_REQUESTS)


def is_right(canary: Canary, message: Mapping[str, Any]) -> bool:
    """Whether an assistant message answers the canary. `message`: of an OpenAI chat completion."""
    if canary.call is not None:
        calls = message.get("tool_calls") or []
        return any(_same_call(canary.call, call.get("function") or {}) for call in calls if isinstance(call, Mapping))
    said = str(message.get("content") or "").lower()
    return all(word in said for word in canary.right)


def draw(shape: str, color: str) -> bytes:
    """A PNG of one shape on a grey ground."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE), GROUND)
    pen, fill, near, far = ImageDraw.Draw(image), COLORS[color], SIDE // 6, SIDE - SIDE // 6
    if shape == "circle":
        pen.ellipse((near, near, far, far), fill=fill)
    elif shape == "square":
        pen.rectangle((near, near, far, far), fill=fill)
    else:
        pen.polygon([(SIDE // 2, near), (near, far), (far, far)], fill=fill)
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def _same_call(wanted: tuple[str, Mapping[str, Any]], function: Mapping[str, Any]) -> bool:
    import json

    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError:
        return False
    return (function.get("name"), arguments) == wanted


def _user(content: str | list[dict[str, Any]]) -> dict[str, Any]:
    return normalize_messages([{"role": "user", "content": content}], where="canary")[0]


def _tool(name: str, what: str, /, **properties: str) -> dict[str, Any]:
    schema = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": schema, "required": list(schema)}
    return {"type": "function", "function": {"name": name, "description": what, "parameters": parameters}}
