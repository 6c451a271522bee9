"""Writes the calibration and evaluation sets that ship with mtpress: JSON lines by the corpus, no line in both.

python tiny/sets.py src/mtpress/builtin
"""

import json
import sys
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


if __name__ == "__main__":
    main()
