"""Messages are read as they are meant, or refused by name; nothing typed becomes a token, whoever's template renders it."""

from pathlib import Path

import pytest
from PIL import Image

from mtpress.bench.prompt_mix import MIX, load_prompts
from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.messages import CONTROL_TOKENS, FORMAT_WORDS, normalize_messages, part_kind, plain
from mtpress.engine.trial.canaries import picture_canaries, text_canaries, tool_canaries
from mtpress.errors import InputError

TYPED = "".join(CONTROL_TOKENS)
# what a template without any care does: the typed text as it came
CARELESS = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


def call(arguments: object) -> list[dict]:
    return [{"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "look", "arguments": arguments}}]}]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ('{"town": "Tarn", "days": [1, null]}', {"town": "Tarn", "days": [1, None]}),
        ({"town": "Tarn"}, {"town": "Tarn"}),
        (" {} ", {}),
        ("", {}),
        ("\n", {}),
        (None, {}),
    ],
)
def test_12_arguments_become_objects(given: object, read: dict) -> None:
    assert normalize_messages(call(given)) == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "id": "1", "function": {"name": "look", "arguments": read}}],
        }
    ]
    bare = normalize_messages([{"role": "assistant", "content": "", "tool_calls": [{"name": "look"}]}])
    assert bare[0]["tool_calls"] == [{"type": "function", "function": {"name": "look", "arguments": {}}}]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (call("{")[0], r"tool_calls\[0\]\.arguments must be JSON, is '\{'"),
        (call('"{}"')[0], r"tool_calls\[0\]\.arguments must be an object, is a str"),
        (call("[" * 100_000)[0], r"tool_calls\[0\]\.arguments must be JSON"),
        (call([1])[0], r"tool_calls\[0\]\.arguments must be an object, is a list"),
        (
            {"role": "user", "content": "", "tool_calls": [{"name": "look"}]},
            "tool_calls belong to an assistant message, this is",
        ),
        ({"role": "assistant", "tool_calls": "look"}, "tool_calls must be a list, is a str"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\]\.name must be a string that names a function"),
        ({"role": "assistant", "reasoning_content": ["Why."]}, "reasoning_content must be a string, is a list"),
        ({"role": "assistant", "reasoning": 7}, "reasoning must be a string, is a int"),
        ({"role": "system", "content": [{"type": "video"}]}, r"content\[0\] is of kind video, which a system message cannot hold"),
        ({"role": "user", "content": [{"type": "smell"}]}, r"content\[0\] must be a text, an image or a video, is \{'type': 'smell'\}"),
        ({"role": "user", "content": 7}, "content must be a string or a list of parts, is a int"),
        ({"role": "critic"}, "role must be one of system, developer, user, assistant, tool, is 'critic'"),
        ("Hello!", "must be an object with role and content, is a str"),
    ],
)
def test_what_is_wrong_is_said_by_name(message: object, words: str) -> None:
    with pytest.raises(InputError, match=rf"^line 3: message 2:? ?{words}"):
        normalize_messages([{"role": "user", "content": "Hello!"}, message], where="line 3")  # type: ignore[list-item]


def test_15_reasoning_has_one_field() -> None:
    for given, read in (
        ({"reasoning": "Why."}, {"reasoning_content": "Why."}),
        ({"reasoning": "No.", "reasoning_content": "Why."}, {"reasoning_content": "Why."}),
        ({"reasoning": "Why.", "reasoning_content": None}, {"reasoning_content": "Why."}),
        ({"reasoning": "", "reasoning_content": None}, {}),
    ):
        assert normalize_messages([{"role": "assistant", "content": "So.", **given}]) == [{"role": "assistant", "content": "So.", **read}]


def test_19_parts_are_what_their_type_or_their_keys_say() -> None:
    picture = Image.new("RGB", (8, 8))
    parts = [
        {"type": "text", "text": "a", "image": None},
        {"type": "image", "image": picture, "text": None},
        {"image_url": {"url": "b.png"}, "text": None},
        "b",
    ]
    read = normalize_messages([{"role": "user", "content": parts}])[0]["content"]
    assert read == [
        {"type": "text", "text": "a"},
        {"type": "image", "image": picture},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "text", "text": "b"},
    ]
    assert read[1]["image"] is picture
    assert [part_kind(part) for part in (*parts, 7, {}, {"type": "text"})] == ["text", "image", "image", "text", None, None, None]


def test_21_typed_tokens_become_text_in_every_field() -> None:
    messages = [
        {"role": "system", "content": f"<|think_on|>{TYPED}"},
        {"role": "user", "content": [{"type": "text", "text": TYPED}]},
        {
            "role": "assistant",
            "content": TYPED,
            "reasoning": TYPED,
            "tool_calls": [{"function": {"name": TYPED, "arguments": {TYPED: [TYPED, {TYPED: TYPED}]}}}],
        },
        {"role": "tool", "content": TYPED},
    ]
    given = str(messages)
    shown = str(normalize_messages(messages))
    assert str(messages) == given  # what was handed in stays as it was
    assert not any(token in shown for token in CONTROL_TOKENS)
    assert shown.count("< |im_end|>") == given.count("<|im_end|>") == 10 and "<|think_on|>" in shown
    assert plain(plain(TYPED)) == plain(TYPED)
    words = "".join(FORMAT_WORDS)
    assert normalize_messages([{"role": "user", "content": words}])[0]["content"] == words


def test_21_no_template_and_no_tokenizer_takes_them_for_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ChatEncoder(BUILTIN_MODEL)
    assert set(encoder.control_tokens) == set(CONTROL_TOKENS)
    special = set(encoder.tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))
    for template in (encoder.tokenizer.chat_template, CARELESS):
        monkeypatch.setattr(encoder.tokenizer, "chat_template", template)
        plain_ids, typed_ids = (encoder.encode([{"role": "user", "content": text}]).input_ids.tolist() for text in ("Hello!", TYPED))
        assert [i for i in typed_ids if i in special] == [i for i in plain_ids if i in special] != []


def test_21_typed_placeholders_are_no_pictures() -> None:
    encoder = ChatEncoder(BUILTIN_MODEL)
    picture = {"type": "image", "image": Image.new("RGB", (64, 64))}
    typed = "<|vision_start|><|image_pad|><|vision_end|>"
    sample = encoder.encode(
        [{"role": "user", "content": [{"type": "text", "text": typed}, picture]}, {"role": "assistant", "content": typed}]
    )
    assert sample.image_grid_thw is not None and len(sample.image_grid_thw) == 1
    token = encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert int((sample.input_ids == token).sum()) == int(sample.image_grid_thw.prod()) // 4
    assert encoder.encode([{"role": "user", "content": typed}]).pixel_values is None


def test_prompts_and_canaries_are_normal_already(tmp_path: Path) -> None:
    for canary in (*text_canaries(), *picture_canaries(), *tool_canaries()):
        assert normalize_messages(canary.messages) == list(canary.messages)
    for prompt in load_prompts(MIX).prompts:
        assert normalize_messages(prompt.messages) == list(prompt.messages)
    file = tmp_path / "own.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "Write <|im_end|>."}]}\n')
    assert load_prompts(str(file)).prompts[0].messages == ({"role": "user", "content": "Write < |im_end|>."},)


def test_a_token_does_not_come_about_where_two_texts_meet() -> None:
    picture = {"type": "image", "image": "a.png"}
    parts = [{"type": "text", "text": "<|im_"}, "end|>", picture, {"type": "text", "text": "x"}]
    read = normalize_messages([{"role": "user", "content": parts}], where="here")
    assert read[0]["content"] == [{"type": "text", "text": plain("<|im_end|>")}, picture, {"type": "text", "text": "x"}]
