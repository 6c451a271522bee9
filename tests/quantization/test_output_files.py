"""Template and sampling of an output: what a recipe names is written, everything else stays byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import IDS, write_small
from mtpress.chat.template import template
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.plan.recipe import Recipe, load_recipe, parse_recipe
from mtpress.quantization.output_files import carried_files, chosen_files, sampling_of, template_of

OTHER = "{{ messages }}"
SEED_SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True}


def recipe(**keys: Any) -> Recipe:
    return parse_recipe({"name": "mine", "summary": "a test", "format": "nvfp4", "quantize": ["mlp"], **keys}, "here")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose template is another in each place where an engine may look."""
    made = write_small(tmp_path / "source")
    (made / "chat_template.jinja").write_text(OTHER)
    (made / "chat_template.json").write_text(json.dumps({"chat_template": OTHER + "!"}))
    (made / "processor_config.json").write_text(json.dumps({"chat_template": OTHER + "?", "processor_class": "Qwen3VLProcessor"}))
    content = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps(content | {"chat_template": "{{ 1 }}"}))
    return made


def written(chosen: Recipe, source: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(carried, chosen) files."""
    checkpoint = Checkpoint.open(source)
    carried = carried_files(checkpoint)
    before = dict(carried)
    files = chosen_files(chosen, checkpoint, carried)
    assert carried == before
    return carried, files


def test_the_sources_template_and_sampling_stay_byte_for_byte(source: Path) -> None:
    carried, files = written(recipe(), source)
    assert files == carried
    assert files["chat_template.jinja"] == OTHER.encode()
    assert template_of(recipe(), files) == "source"
    assert sampling_of(files) == {"do_sample": True, "temperature": 0.7}


def test_ours_is_the_only_template(source: Path) -> None:
    chosen = recipe(chat_template="mtpress")
    carried, files = written(chosen, source)
    assert files["chat_template.jinja"] == template().encode()
    assert carried.keys() - files.keys() == {"chat_template.json"}
    assert [name for name, content in files.items() if name != "chat_template.jinja" and b"{{" in content] == []
    assert json.loads(files["processor_config.json"]) == {"processor_class": "Qwen3VLProcessor"}
    assert json.loads(files["tokenizer_config.json"]).keys() == json.loads(carried["tokenizer_config.json"]).keys() - {"chat_template"}
    changed = {"chat_template.jinja", "processor_config.json", "tokenizer_config.json"}
    assert {name for name in files if files[name] != carried.get(name)} == changed
    assert template_of(chosen, files) == "mtpress"


def test_files_without_a_template_in_them_stay_byte_for_byte(tmp_path: Path) -> None:
    carried, files = written(recipe(chat_template="mtpress"), write_small(tmp_path / "small"))
    assert files == carried


def test_a_source_without_a_template(tmp_path: Path) -> None:
    made = write_small(tmp_path / "small")
    (made / "chat_template.jinja").unlink()
    assert template_of(recipe(), written(recipe(), made)[1]) == "none"
    files = written(recipe(chat_template="mtpress"), made)[1]
    assert files["chat_template.jinja"] == template().encode()


def test_sampling_is_merged_and_the_end_tokens_stay(source: Path) -> None:
    chosen = load_recipe("nvfp4-cascade-vlm")
    carried, files = written(chosen, source)
    content = json.loads(files["generation_config.json"])
    assert content == json.loads(carried["generation_config.json"]) | SEED_SAMPLING
    assert content["eos_token_id"] == [IDS["<|im_end|>"], IDS["<|endoftext|>"]]
    assert sampling_of(files) == SEED_SAMPLING


def test_sampling_without_a_generation_config_names_what_ends_a_turn(source: Path) -> None:
    (source / "generation_config.json").unlink()
    files = written(recipe(generation_config={"temperature": 0.6}), source)[1]
    assert json.loads(files["generation_config.json"]) == {
        "eos_token_id": [IDS["<|im_end|>"], IDS["<|endoftext|>"]],
        "pad_token_id": IDS["<|endoftext|>"],
        "temperature": 0.6,
        "do_sample": True,
    }
