"""Writes the calibration and evaluation sets that ship with mtpress: JSON lines made by the corpus from splits of their own.

python tiny/sets.py src/mtpress/builtin
"""

import json
import sys
from itertools import islice
from pathlib import Path

from corpus import Document, documents

NUM_DOCUMENTS = {"calibration": 128, "evaluation": 128}


def row(document: Document) -> dict[str, object]:
    if document.text:
        return {"text": document.text}
    found: dict[str, object] = {"messages": document.messages}
    if document.tools:
        found["tools"] = document.tools
    if document.enable_thinking is not None:
        found["enable_thinking"] = document.enable_thinking
    return found


def main() -> None:
    out = Path(sys.argv[1])
    for split, count in NUM_DOCUMENTS.items():
        spoken = (d for d in documents(split) if not d.pictures)
        lines = [json.dumps(row(d), ensure_ascii=False) for d in islice(spoken, count)]
        (out / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
