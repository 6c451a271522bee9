import json
from pathlib import Path

import pytest

from mtpress.bench.prompt_mix import TEMPLATE_TOKENS, load_prompts
from mtpress.builtin import BUILTIN_MODEL, EVALUATION_FILE
from mtpress.errors import InputError

KINDS = ("chat", "code", "maths", "summary", "tools")


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_the_shipped_mix_is_a_mix_from_its_first_five_prompts_on() -> None:
    prompts = load_prompts("mix").prompts
    assert len(prompts) >= 40
    assert [prompt.kind for prompt in prompts] == [KINDS[number % 5] for number in range(len(prompts))]
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert all(60 < len(prompt.text) <= 1200 for prompt in prompts)


def test_the_shipped_mix_and_700_tokens_fit_a_small_vocabulary() -> None:
    assert load_prompts("mix").longest_tokens(BUILTIN_MODEL / "tokenizer.json") + 700 <= 4096


def test_the_longest_prompt_is_never_counted_shorter_than_the_template_makes_it() -> None:
    from mtpress.chat.encoder import ChatEncoder

    mix, encoder = load_prompts("mix"), ChatEncoder(BUILTIN_MODEL)
    true = max(len(encoder.encode(list(p.messages), add_generation_prompt=True).input_ids) for p in mix.prompts)
    assert true <= mix.longest_tokens(BUILTIN_MODEL / "tokenizer.json") <= true + TEMPLATE_TOKENS


def test_a_file_is_asked_up_to_its_last_user_turn(tmp_path: Path) -> None:
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello."}
    mix = load_prompts(write(tmp_path / "own.jsonl", {"messages": [system, user("Hi"), answer, user("And?"), answer]}))
    (prompt,) = mix.prompts
    assert list(prompt.messages) == [system, user("Hi"), answer, user("And?")]
    mix.write(tmp_path / "sent.jsonl")
    assert json.loads((tmp_path / "sent.jsonl").read_text()) == {"prompt": list(prompt.messages)}


def test_a_single_question_is_sent_as_text(tmp_path: Path) -> None:
    load_prompts(write(tmp_path / "own.jsonl", {"messages": [user("Grüße 👋")]})).write(tmp_path / "sent.jsonl")
    assert json.loads((tmp_path / "sent.jsonl").read_text(encoding="utf-8")) == {"prompt": "Grüße 👋"}


def test_rows_that_plain_chat_cannot_say_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = (
        {"text": "No question."},
        {"messages": [user("With a tool")], "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
        {"messages": [{"role": "assistant", "content": "I begin."}]},
        {"messages": [user("Kept")]},
    )
    mix = load_prompts(write(tmp_path / "own.jsonl", *rows))
    assert [prompt.text for prompt in mix.prompts] == ["Kept"]
    assert mix.num_left_out == 4


def test_the_evaluation_set_can_be_asked() -> None:
    mix = load_prompts(str(EVALUATION_FILE))
    assert len(mix.prompts) >= 40
    assert len(mix.prompts) + mix.num_left_out == 128


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "only text"}], "no row that can be asked"),
        ([{"messages": "hello"}], 'neither "messages"'),
        ([], "no row that can be asked"),
    ],
)
def test_a_file_without_questions_is_refused_in_one_line(tmp_path: Path, rows: list[object], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_prompts(write(tmp_path / "own.jsonl", *rows))
    assert "\n" not in str(caught.value)


def test_a_mistyped_name_is_told_what_there_is() -> None:
    with pytest.raises(InputError, match=r"mixed: no such file; .* mix .* random"):
        load_prompts("mixed")


def test_the_hash_is_of_what_is_sent(tmp_path: Path) -> None:
    one = load_prompts(write(tmp_path / "one.jsonl", {"kind": "a", "messages": [user("Hi")]}))
    same = load_prompts(write(tmp_path / "two.jsonl", {"messages": [user("Hi"), {"role": "assistant", "content": "x"}]}))
    other = load_prompts(write(tmp_path / "three.jsonl", {"messages": [user("Hi!")]}))
    assert one.sha256 == same.sha256 != other.sha256
