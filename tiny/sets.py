"""Writes the calibration and evaluation sets that ship with mtpress: JSON lines by the corpus, no line and no picture in both.

python tiny/sets.py src/mtpress/builtin
"""

import base64
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from corpus import Document, Picture, documents

NUM_DOCUMENTS = {"calibration": 128, "evaluation": 128}
SEVERAL_TURNS = 4  # each row of this number has two pictures, one a turn


def row(document: Document) -> dict[str, object]:
    if document.text:
        return {"text": document.text}
    found: dict[str, object] = {"messages": document.messages}
    if document.tools:
        found["tools"] = document.tools
    if document.enable_thinking is not None:
        found["enable_thinking"] = document.enable_thinking
    return found


def data_uri(picture: Picture) -> str:
    file = io.BytesIO()
    picture.draw().save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def with_pictures(document: Document) -> list[dict[str, object]]:
    """Its messages, each image part with its picture as a data URI."""
    pictures = iter(document.pictures)

    def part(content: dict[str, object]) -> dict[str, object]:
        return {"type": "image_url", "image_url": {"url": data_uri(next(pictures))}} if content["type"] == "image" else content

    return [
        {**message, "content": [part(p) for p in message["content"]]} if isinstance(message["content"], list) else message
        for message in document.messages
    ]


def picture_rows(split: str) -> Iterator[list[Document]]:
    """Documents with pictures; every fourth row has two of them, one after the other."""
    shown = documents(split, kinds=("see",))
    for number in range(NUM_DOCUMENTS[split]):
        yield [next(shown) for _ in range(1 + ((number + 1) % SEVERAL_TURNS == 0))]


def main() -> None:
    out, taken = Path(sys.argv[1]), set[str]()
    for split, count in NUM_DOCUMENTS.items():
        lines: list[str] = []
        for document in documents(split):
            line = json.dumps(row(document), ensure_ascii=False)
            if not document.pictures and line not in taken:
                taken.add(line)
                lines.append(line)
            if len(lines) == count:
                break
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = [{"messages": [turn for document in row for turn in with_pictures(document)]} for row in picture_rows(split)]
        (out / f"{split}_images.jsonl").write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
