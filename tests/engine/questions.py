"""Held-out questions with known answers, as vLLM is asked them: facts, sums, lists, reading, long stories, pictures."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus import direct_sums, document, see

ANSWERS, STORIES, PICTURES = "answers", "stories", "pictures"
NUM_PICTURES, NUM_STORIES = 20, 8
PER_KIND = {"town_fact": 6, "direct_sums": 6, "listing": 6, "how_to": 2, "code": 3, "reading": 5, "summary": 2}


@dataclass(frozen=True)
class Question:
    """One prompt of a request; `answer` is the only right one, None where many are."""

    group: str
    messages: list[dict[str, Any]]
    answer: str | None

    def as_prompt(self) -> dict[str, Any]:
        return {"group": self.group, "messages": self.messages}


def text_questions() -> Iterator[Question]:
    """Questions with one right answer each, then requests for stories, whose length gives the draft head work."""
    for kind, count in PER_KIND.items():
        for index in range(count):
            # of sums, the numbers are what is held out; of everything else, the document
            asked = direct_sums(random.Random(index), held_out=True) if kind == "direct_sums" else document("held-out", index, (kind,))
            yield Question(ANSWERS, asked.messages[:1], asked.messages[1]["content"])
    for index in range(NUM_STORIES):
        yield Question(STORIES, document("held-out", index, ("tell",)).messages[:1], None)


def picture_questions(folder: Path) -> Iterator[Question]:
    """One shape each, drawn into PNG files in `folder`; the answer names color and shape."""
    for index in range(NUM_PICTURES):
        shown = see(random.Random(900_000 + index), num_items=1)
        name = f"picture-{index}.png"
        shown.pictures[0].draw().save(folder / name)
        text = next(part for part in shown.messages[0]["content"] if part["type"] == "text")
        content = [{"type": "image", "path": name}, text]
        yield Question(PICTURES, [{"role": "user", "content": content}], shown.messages[1]["content"])
