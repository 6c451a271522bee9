"""What the templates that Qwen ships do of our numbered rules: the table of docs/chat-template.md.

    python benchmarks/official_templates.py              prints it
    python benchmarks/official_templates.py --write      puts it into docs/chat-template.md between its markers
    python benchmarks/official_templates.py --failures   prints every failing case, a line each

In: mtpress.chat.cases, and the templates of the trl in .envs/templates (locks/make_env.py makes it). Out: Markdown. Leaves
out: their text. They are read where they are installed; the words here are ours. Seconds of one core.
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from mtpress.chat.cases import CASES
from mtpress.chat.template import Failure, behaviour
from real_exports import peer_python

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/chat-template.md"
MARKER = re.compile(r"(<!-- official templates -->\n).*?(<!-- end -->)", re.DOTALL)
# column → file of trl; Qwen3.5 comes in two, for models that think unless told otherwise and for models that do not
OFFICIAL = {"3.5 think": "qwen3_5_think", "3.5 no think": "qwen3_5_nothink", "3.6": "qwen3_6", "3.8": "qwen3_8"}
# rule, pattern of the titles of its cases, what goes wrong in those; the first that fits
WORDS = (
    (1, "one question", "thinks unless told otherwise"),
    (1, "invented", "writes a system text that nobody sent"),
    (2, "refused", "takes text and numbers for a mode without a word"),
    (2, "null", "null is not as if unset"),
    (3, "", "has no tags: they stay in the prompt and switch nothing, or the message is refused"),
    (5, "", "has no handoff"),
    (6, "", "makes a block of an empty system message"),
    (7, "developer|leading", "refuses `developer`"),
    (7, "later system", "refuses a later system message"),
    (8, "", "refuses a conversation without a question"),
    (11, "", "writes true and null as Python does"),
    (12, "null|JSON", "null and strings of JSON end in a TypeError"),
    (12, "''", "so does ''"),
    (14, "leading", "a result at the beginning opens no turn"),
    (15, "^reasoning($| where)", "does not read `reasoning`"),
    (15, "^reasoning_content", "leaves out earlier reasoning whatever the switches"),
    (15, "begins with", "an inline thought is left out, or comes behind an empty block"),
    (15, "visible", "cuts text at a visible `</think>`"),
    (16, "blank|parser", "strips white space"),
    (16, "^an answer", "does not repeat the empty block that the prompt ended with"),
    (16, "^a thought", "leaves out earlier reasoning"),
    (17, "by default", "leaves out earlier reasoning by default"),
    (17, "=true", "knows no `preserve_thinking`"),
    (17, "^an empty block", "has no empty block where the mode was off"),
    (17, "lost thought", "has one for a lost thought"),
    (17, "later", "refuses a later system message"),
    (18, "thought is", "cannot go on with a thought"),
    (19, "video_url", "refuses `video_url`"),
    (19, "null", "takes a key that holds null for a picture"),
    (21, "vision", "counts typed placeholders as pictures"),
    (21, "", "lets typed control tokens act"),
)  # fmt: skip


def official_templates(python: Path) -> dict[str, str]:
    """Column → text of the template, from the trl beside that python."""
    (folder,) = python.parents[1].glob("lib/python3*/site-packages/trl/chat_templates")
    return {column: (folder / f"{name}.jinja").read_text(encoding="utf-8") for column, name in OFFICIAL.items()}


def judged(templates: Mapping[str, str]) -> dict[str, list[Failure]]:
    """Column → the cases that fail."""
    return {column: behaviour(text) for column, text in templates.items()}


def table(failures: Mapping[str, Sequence[Failure]]) -> str:
    """A row a rule that one of the templates breaks: failing cases in each, and what goes wrong."""
    per_rule = {column: Counter(failure.number for failure in found) for column, found in failures.items()}
    cases = Counter(case.number for case in CASES)
    broken = [number for number in cases if any(counts[number] for counts in per_rule.values())]
    rows = [
        ["rule", "cases", *failures, "what goes wrong"],
        ["---", *["---:"] * (len(failures) + 1), "---"],
        *([str(n), str(cases[n]), *(str(counts[n] or "") for counts in per_rule.values()), said(n, failures)] for n in broken),
        ["all", str(len(CASES)), *(str(len(found)) for found in failures.values()), ""],
    ]
    kept = [str(number) for number in cases if number not in broken]
    lines = "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)
    return f"{lines}\n\nAll four keep rules {', '.join(kept[:-1])} and {kept[-1]}.\n"


def said(number: int, failures: Mapping[str, Sequence[Failure]]) -> str:
    """What goes wrong with a rule; which templates it is true of where it is not all of them."""
    seen: dict[str, list[str]] = {words: [] for n, _, words in WORDS if n == number}
    for column, found in failures.items():
        for title in (failure.title for failure in found if failure.number == number):
            words = next((words for n, pattern, words in WORDS if n == number and re.search(pattern, title)), None)
            assert words, f"no words for rule {number}, {title}: add them"
            if column not in seen[words]:
                seen[words].append(column)
    where = {words: f" ({_shorter(columns)})" if len(columns) < len(failures) else "" for words, columns in seen.items() if columns}
    return "; ".join(f"{words}{columns}" for words, columns in where.items())


def _shorter(columns: Sequence[str]) -> str:
    versions = [column.partition(" ")[0] for column in columns]
    return ", ".join(dict.fromkeys(v if versions.count(v) == 2 else c for v, c in zip(versions, columns, strict=True)))


def filled(document: str, generated: str) -> str:
    """The document with the table between its markers."""
    assert len(MARKER.findall(document)) == 1
    return MARKER.sub(lambda found: f"{found[1]}\n{generated}\n{found[2]}", document)


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--write"], ["--failures"]):
        print(__doc__)
        return 2
    failures = judged(official_templates(peer_python("templates")))
    if arguments == ["--failures"]:
        print("\n".join(f"{column}: {failure}" for column, found in failures.items() for failure in found))
    elif arguments:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), table(failures)), encoding="utf-8")
    else:
        print(table(failures), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
