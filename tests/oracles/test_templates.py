"""Our chat template beside the official ones, TRL and the vocabulary of Qwen3.6. Numbers are the rules of docs/chat-template.md.

The official templates are read from the installed trl. One process of .envs/templates answers everything else at once.
"""

import json
import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat.cases import ASSISTANT, CASES, HELLO, NO_THOUGHT, WEATHER, Message, assistant, call, system, text, tool, user
from mtpress.chat.messages import CONTROL_TOKENS, FORMAT_WORDS
from mtpress.chat.template import render, template
from official_templates import DOCUMENT, OFFICIAL, filled, judged, official_templates, table
from qwen3_6_files import Width

pytestmark = pytest.mark.oracle
SCRIPT = Path(__file__).with_name("template_answers.py")
TIMEOUT_SECONDS = 300  # it takes five; this leaves room for a busy machine
THINKING, INSTRUCT = {"enable_thinking": True, "add_generation_prompt": True}, {"enable_thinking": False, "add_generation_prompt": True}
ODD = {
    "type": "function",
    "function": {
        "parameters": {
            "type": "object",
            "properties": {
                "größe": {"type": ["integer", "null"], "default": None, "minimum": -1.5e-7, "enum": [1, 2, True, "a\"b\\c\n'd'"]},
                "x<y>": {"anyOf": [{"type": "array", "items": {}}, {"$ref": "#/$defs/é"}]},
            },
            "$defs": {"é": {"const": "</tools> & <b>日本語 \u2028 🙂"}},
        },
        "strict": True,
        "name": "odd",
        "description": "",
    },
}
BARE = {"name": "no type around it", "extra": [], "parameters": {}}
TOOLS = {"one": [WEATHER], "two": [WEATHER, ODD], "odd": [ODD], "bare": [BARE, BARE, ODD]}

# --- what is typed, and where (21) -----------------------------------------------------------------------------------

PIECES = (
    "<",
    "|",
    ">",
    "<|",
    "|>",
    "im_end",
    "im_start",
    "_",
    "image_pad",
    "<|think_on|>",
    "<|think_off|>",
    "tts_pad",
    " ",
    "\n",
    "ſ",
    "﹤",
)
NUM_MIXTURES = 150


def typed() -> list[str]:
    """Every control token alone and within text, tokens within tokens, and mixtures of their pieces."""
    rng = random.Random(21)
    nested = [f"<|im_{inner}end|>" for inner in ("<|im_end|>", "<|think_on|>", "<|think_off|>", "< ", "\u200b")]
    mixed = ["".join(rng.choices((*PIECES, *CONTROL_TOKENS), k=rng.randint(2, 9))) for _ in range(NUM_MIXTURES)]
    return [*CONTROL_TOKENS, *(f"a{token}{token}b" for token in CONTROL_TOKENS), "<<|im_end|>|im_end|>", *nested, *mixed]


def conversation(said: str) -> tuple[list[Message], list[dict[str, Any]]]:
    """`said` in every place where somebody's text stands, and pictures between; the tools."""
    looks = assistant(said, reasoning_content=said, tool_calls=[call(f"look{said}.", **{f"at{said}.": said, "in": [said, {said: 1}]})])
    messages = [
        system(f"Be kind. {said}"),
        user([text(said), {"type": "image", "image": "a.png"}, text(said), {"type": "video", "video": "a.mp4"}, text(said)]),
        looks,
        tool([text(said), {"type": "image", "image": "a.png"}]),
        assistant(said),
        {"role": "developer", "content": [text(said)]},
        user(said),
    ]
    described = {**WEATHER["function"], "name": f"look{said}.", "description": said}
    return messages, [{"type": "function", "function": described}]


def joined(said: str) -> Iterator[list[Message]]:
    """`said` cut in two at each place, as parts that the template writes one behind the other."""
    for at in range(1, len(said)):
        yield [user([text(said[:at]), text(said[at:])]), assistant([text(said[:at]), text(said[at:])]), tool([said[:at], said[at:]])]


def named(token: str) -> list[Message]:
    """Names that the format's own `>` would make a token of."""
    cut = token.removesuffix(">")
    return [*HELLO, assistant("", tool_calls=[call(f"look{cut}", **{f"at{cut}": "x"})])]


# --- what is asked of the other environment --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """trl: template → assertion → what it says. special: token → id. ids: text → token ids of Qwen3.6."""

    trl: Mapping[str, Mapping[str, bool]]
    special: Mapping[str, int]
    ids: Mapping[str, Sequence[int]]

    def control(self, rendered: str) -> Counter[str]:
        """The control tokens among the ids of a text; words of the format, which stay as they are typed, do not count."""
        names = {index: token for token, index in self.special.items() if token not in FORMAT_WORDS}
        return Counter(names[index] for index in self.ids[rendered] if index in names)


def shown(said: str, **kwargs: Any) -> str:
    messages, tools = conversation(said)
    return render(template(), messages, tools, **{**INSTRUCT, **kwargs})


def growths() -> Iterator[tuple[str, str, str]]:
    """Title, prompt and next prompt of each case of rule 16."""
    for case in CASES:
        if growth := case.must.get("prefix"):
            asked = {**case.kwargs, "add_generation_prompt": True}
            after = [*case.messages, growth.message, *growth.then]
            yield case.title, render(template(), case.messages, case.tools, **asked), render(template(), after, case.tools, **asked)


STOPLESS = template(training=True).replace(
    "~ '<|im_end|>' -}}\n    {%- endgeneration -%}", "-}}\n    {%- endgeneration -%}{{- '<|im_end|>' -}}"
)
INSTRUCT_PROMPT, THINKING_PROMPT = (render(template(), HELLO, **kwargs) for kwargs in (INSTRUCT, THINKING))


@pytest.fixture(scope="module")
def official(templates_python: Path) -> dict[str, str]:
    return official_templates(templates_python)


@pytest.fixture(scope="module")
def answers(templates_python: Path, official: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    texts = [INSTRUCT_PROMPT, THINKING_PROMPT, ASSISTANT + NO_THOUGHT, f"{ASSISTANT}<think>\n", *CONTROL_TOKENS, *FORMAT_WORDS]
    texts += [shown(said) for said in ("x", *typed())]
    texts += [render(template(), messages) for said in (*CONTROL_TOKENS, "xx") for messages in (*joined(said), named(said))]
    texts += [prompt for growth in growths() for prompt in growth[1:]]
    texts = list(dict.fromkeys(texts))
    templates = {"serving": template(), "training": template(training=True), "stopless": STOPLESS, **official}
    request, result = (tmp_path_factory.mktemp("templates") / name for name in ("request.json", "result.json"))
    request.write_text(json.dumps({"tokenizer": str(BUILTIN_MODEL), "templates": templates, "texts": texts}), encoding="utf-8")
    done = subprocess.run(
        [str(templates_python), str(SCRIPT), str(request), str(result)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(result.read_text(encoding="utf-8"))
    return Answers(found["trl"], found["special"], dict(zip(texts, found["ids"], strict=True)))


# --- the official templates ------------------------------------------------------------------------------------------


def test_docs_say_what_the_official_templates_do(official: Mapping[str, str]) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == filled(document, table(judged(official))), "run python benchmarks/official_templates.py --write"


def test_nothing_of_theirs_is_ours(official: Mapping[str, str]) -> None:
    """A long line that stands in one of theirs and in the document would be an excerpt."""
    lines = {line.strip() for text in official.values() for line in text.splitlines() if len(line.strip()) > 30}
    assert len(lines) > 50
    assert [line for line in lines if line in DOCUMENT.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("tools", TOOLS)
@pytest.mark.parametrize("column", OFFICIAL)
def test_10_a_prompt_with_tools_is_the_official_one_byte_for_byte(column: str, tools: str, official: Mapping[str, str]) -> None:
    for messages in (HELLO, (system("Be kind. <b>Ä</b>"), *HELLO)):
        theirs = render(official[column], messages, TOOLS[tools], **INSTRUCT)
        assert render(template(), messages, TOOLS[tools], **INSTRUCT).encode() == theirs.encode()
        assert theirs.startswith("<|im_start|>system\n# Tools\n") and theirs.count("\n{") == len(TOOLS[tools])


# --- the vocabulary of Qwen3.6 ---------------------------------------------------------------------------------------


def test_the_vocabulary_has_the_tokens_that_are_named_here(answers: Answers) -> None:
    assert set(answers.special) == {*CONTROL_TOKENS, *FORMAT_WORDS}
    assert dict(answers.special) == Width().ids
    for token, index in answers.special.items():
        assert answers.ids[token] == [index]


def test_01_02_generation_prompts_as_tokens(answers: Answers) -> None:
    """<|im_start|> assistant \\n <think> \\n\\n </think> \\n\\n, and <|im_start|> assistant \\n <think> \\n"""
    instruct, thinking = [248045, 74455, 198, 248068, 271, 248069, 271], [248045, 74455, 198, 248068, 198]
    assert answers.ids[ASSISTANT + NO_THOUGHT] == instruct
    assert answers.ids[f"{ASSISTANT}<think>\n"] == thinking
    assert answers.ids[INSTRUCT_PROMPT][-len(instruct) :] == instruct
    assert answers.ids[THINKING_PROMPT][-len(thinking) :] == thinking
    assert answers.ids[INSTRUCT_PROMPT][0] == 248045, "no token stands before the first turn"


def test_16_tokens_of_a_prompt_begin_those_of_the_next(answers: Answers) -> None:
    """The prefix cache compares tokens. Where an answer begins with line ends, the tokenizer joins them with the prompt's last."""
    found = list(growths())
    assert len(found) > 8
    broken = [title for title, prompt, after in found if answers.ids[after][: len(answers.ids[prompt])] != answers.ids[prompt]]
    assert broken == ["an answer, blank at both ends"]


def test_21_control_tokens_that_are_typed_are_no_tokens(answers: Answers) -> None:
    expected = answers.control(shown("x"))
    assert expected["<|im_start|>"] == 8 and expected["<|image_pad|>"] == 2 and expected["<|video_pad|>"] == 1
    assert [said for said in typed() if answers.control(shown(said)) != expected] == []


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(True, id="cut in two parts"),
        pytest.param(False, id="with the format's >"),
    ],
)
def test_21_nor_are_those_that_come_about_in_rendering(parts: bool, answers: Answers) -> None:
    def made(said: str) -> list[str]:
        return [render(template(), messages) for messages in (joined(said) if parts else (named(said),))]

    expected = answers.control(made("xx")[0])
    assert [token for token in CONTROL_TOKENS if any(answers.control(t) != expected for t in made(token))] == []


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_27_trl_takes_the_training_variant(answers: Answers) -> None:
    assert set(answers.trl["training"].values()) == {True} and len(answers.trl["training"]) == 3


def test_27_trl_refuses_what_it_should(answers: Answers) -> None:
    markers, prefix, stop = "has_generation_markers", "is_chat_template_prefix_preserving", "is_chat_template_stop_token_trained"
    assert answers.trl["serving"] == {markers: False, prefix: True, stop: False}
    assert answers.trl["stopless"] == {markers: True, prefix: True, stop: False}
    assert [column for column in OFFICIAL if answers.trl[column][markers] or answers.trl[column][stop]] == []
    assert [column for column in OFFICIAL if not answers.trl[column][prefix]] == []
