"""Whose template it is, by what it makes of a few conversations."""

import json
import shutil
from pathlib import Path

import pytest

from checkpoints import weight_only
from mtpress.beside_weights import template_choice
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.recipe import load_recipe
from mtpress.record import RECORD_NAME
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize
from mtpress.template_origin import origin
from mtpress.templating import template

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PROMPTED = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Tarn.<|im_end|>\n{% endif %}"
SOURCE_TEMPLATES = {
    "system prompt": PROMPTED + template(),
    "system prompt, plain": PROMPTED + CHATML,
    "plain": CHATML,
    "other format": template().replace("<tool_response>", "<result>"),
}


@pytest.mark.parametrize("text", SOURCE_TEMPLATES.values(), ids=SOURCE_TEMPLATES.keys())
def test_the_authors_own(text: str) -> None:
    assert origin(text).kind == "own"


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
