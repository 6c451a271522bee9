"""Whose template it is, by what it makes of a few conversations."""

import json
import shutil
from pathlib import Path

import pytest

from checkpoints import weight_only
from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.template import template
from mtpress.chat.template_origin import origin
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.record import RECORD_NAME
from mtpress.errors import InputError
from mtpress.plan.recipe import load_recipe
from mtpress.quantization.output_files import template_choice
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize, samples_of

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PROMPTED = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tarn.<|im_end|>\n{% endif %}"
SOURCE_TEMPLATES = {
    "system prompt": PROMPTED + template(),
    "system prompt, plain": PROMPTED + CHATML,
    "plain": CHATML,
    "other format": template().replace("<tool_response>", "<result>"),
}
# With turns of their author's own marks, as Llama 3 and 3.1, Gemma 3, Zephyr and variants of ChatML write them.
OWN_TURNS = {
    "llama 3": "{% for m in messages %}{% set c = '<|head|>' + m.role + '<|end_head|>\n\n' + m.content | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set c = '<|begin|>' + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|>assistant<|end_head|>\n\n' }}{% endif %}",
    "llama 3.1": "{{- '<|head|>system<|end_head|>' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% endif %}{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ '<|eot|>' }}"
    "{% for m in messages %}{% if 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}{{ '<|head|>assistant<|end_head|>' + {'name': f.name, 'parameters': f.arguments} | tojson }}"
    "{{ '<|eot|>' }}{% else %}{{ '<|head|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_head|>' + m.content + '<|eot|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|end_head|>' }}{% endif %}",
    "gemma 3": "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<|head|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ first if loop.first }}{% if m.content is string %}"
    "{{ m.content | trim }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>model\n{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "chatml variant": CHATML.replace("<|im_start|>", "<|turn|>").replace("<|im_end|>", "<|eot|>"),
}
MARKS = ("<|head|>", "<|end_head|>", "<|eot|>", "<|turn|>", "<|begin|>")


@pytest.mark.parametrize("text", SOURCE_TEMPLATES.values(), ids=SOURCE_TEMPLATES.keys())
def test_the_authors_own(text: str) -> None:
    assert origin(text).kind == "own"


@pytest.mark.parametrize("text", OWN_TURNS.values(), ids=OWN_TURNS.keys())
def test_turns_with_marks_of_their_own_are_the_authors(text: str) -> None:
    found = origin(text, True, (("eos_token", "<|eot|>"),))
    assert found.kind == "own"
    assert "im_start|>user" in found.what


def test_ours_and_what_differs_in_text_alone() -> None:
    assert origin(template() + "\n").kind == "ours"
    assert origin("{# mended #}" + template()).kind == "official-like"


@pytest.mark.parametrize("text", [None, "{{ 1 }}", "{% if %}", template().replace("plain(tool | tojson)", "''")])
def test_what_loses_what_is_sent(text: str | None) -> None:
    assert origin(text).kind == "broken"


def source_with(folder: Path, text: str | None, place: str = "chat_template.jinja") -> Path:
    """mtpress-tiny with another template, or with none."""
    folder.mkdir()
    for path in BUILTIN_MODEL.iterdir():
        if path.name != "chat_template.jinja":
            shutil.copy(path, folder / path.name)
    if place == "tokenizer_config.json":
        (folder / place).unlink()
        content = json.loads((BUILTIN_MODEL / place).read_text()) | {"chat_template": text}
        (folder / place).write_text(json.dumps(content))
    elif text is not None:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(text)
    return folder


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_authors_template_is_kept_and_said(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_with(tmp_path / "source", PROMPTED + CHATML, place)
    result = quantize(source, tmp_path / "out", weight_only("nvfp4-mtp-vlm"))
    assert result.chat_template == "source"
    assert (tmp_path / "out" / place).read_bytes() == (source / place).read_bytes()
    (note,) = result.notes
    assert note in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / RECORD_NAME).read_text())
    assert record["notes"] == [note]
    assert record["source_template"]["kind"] == "own"
    for word in (place, "author's own", "is kept", "chat_template: source", "--chat-template replace"):
        assert word in note
    findings = {finding.id: finding.severity for finding in check(tmp_path / "out").findings}
    assert findings == {"template-loses": "warning"}


def marked(folder: Path, text: str) -> Path:
    """mtpress-tiny with a template whose marks are tokens that its author added, one of them the end of a turn."""
    source = source_with(folder, text)
    tokenizer, config, generation = (
        json.loads((source / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    )
    tokens = {content: tokenizer["added_tokens"][-1]["id"] + 1 + i for i, content in enumerate(MARKS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer["added_tokens"] += [{"id": number, "content": token, **flags} for token, number in tokens.items()]
    config["added_tokens_decoder"] |= {str(number): {"content": token, **flags} for token, number in tokens.items()}
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config | {"eos_token": "<|eot|>"}),
        ("generation_config.json", generation | {"eos_token_id": [tokens["<|eot|>"]]}),
    ):
        (source / name).write_text(json.dumps(content))
    return source


@pytest.mark.parametrize("kind", ["llama 3.1", "gemma 3"])
def test_quantize_keeps_turns_with_marks_of_their_own_and_check_finds_no_error(kind: str, tmp_path: Path) -> None:
    source = marked(tmp_path / "source", OWN_TURNS[kind])
    result = quantize(source, tmp_path / "out", weight_only("nvfp4-mtp-vlm"), silent=True)
    assert (tmp_path / "out/chat_template.jinja").read_text() == OWN_TURNS[kind]
    (note,) = result.notes
    assert "its author's own and is kept" in note
    found = {finding.id: finding.severity for finding in check(tmp_path / "out", source).findings}
    assert found == {"template-loses": "warning", "template-choices": "note"}


def test_calibration_renders_with_the_template_that_is_kept(tmp_path: Path) -> None:
    source = marked(tmp_path / "source", OWN_TURNS["llama 3"])
    (tmp_path / "said.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello!"}]}))
    recipe, checkpoint = load_recipe("nvfp4-mtp-vlm"), Checkpoint.open(source)
    assert not template_choice(recipe, checkpoint).ours
    found = samples_of(checkpoint, recipe.model_copy(update={"chat_template": "source"}), [str(tmp_path / "said.jsonl")])
    text = ChatEncoder(source).tokenizer.decode(found.samples[0].input_ids)
    assert text == "<|begin|><|head|>user<|end_head|>\n\nHello!<|eot|>"


def test_ours_over_another_is_said_with_how_to_keep_it(tmp_path: Path) -> None:
    recipe = load_recipe("nvfp4-mtp-vlm")
    for name, text, words in (("like", "{# mended #}" + template(), "none of the official ones"), ("own", CHATML, "its author's own")):
        made = Checkpoint.open(source_with(tmp_path / name, text))
        choice = template_choice(recipe.model_copy(update={"chat_template": "replace"}), made)
        assert choice.ours
        assert choice.note is not None
        assert words in choice.note
        assert choice.note.endswith("chat_template: source keeps it")
    assert template_choice(recipe, Checkpoint.open(source_with(tmp_path / "ours", template()))).note is None
    assert template_choice(recipe, Checkpoint.open(source_with(tmp_path / "none", None))).note is None


def test_a_template_that_does_not_work_is_not_carried(tmp_path: Path) -> None:
    made = Checkpoint.open(source_with(tmp_path / "broken", "{{ 1 }}"))
    recipe = load_recipe("nvfp4-mtp-vlm")
    assert template_choice(recipe, made).ours
    with pytest.raises(InputError, match="--chat-template mtpress, or mend it"):
        template_choice(recipe.model_copy(update={"chat_template": "source"}), made)


def test_named_templates_go_with_the_sources(tmp_path: Path) -> None:
    source = source_with(tmp_path / "original", CHATML, "additional_chat_templates/rag.jinja")
    (source / "chat_template.jinja").write_text(PROMPTED + CHATML)
    for name in ("source", "replace"):
        recipe = weight_only("nvfp4-mtp-vlm").model_copy(update={"chat_template": name})
        quantize(source, tmp_path / name, recipe, silent=True)
    assert (tmp_path / "source/additional_chat_templates/rag.jinja").read_text() == CHATML
    assert not (tmp_path / "replace/additional_chat_templates").exists()
