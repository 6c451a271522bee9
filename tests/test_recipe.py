from pathlib import Path
from typing import Any

import pytest

from mtpress.errors import InputError
from mtpress.recipe import CalibrationSource, Recipe, load_recipe, parse_recipe, recipe_file, shipped

SOUND: dict[str, Any] = {"name": "mine", "summary": "a test", "format": "nvfp4", "quantize": ["mlp"]}


def test_every_shipped_recipe_loads_under_its_file_name() -> None:
    names = list(shipped())
    assert {"nvfp4-mtp-vlm", "nvfp4-mtp-text", "nvfp4-kvfp8-vlm"} <= set(names)
    for name in names:
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.quantize
        assert recipe.summary.strip()
        assert "\n" not in recipe.summary
        assert recipe == load_recipe(recipe_file(name))


def test_a_file_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsummary: a test\nformat: nvfp4\nquantize: [mlp, gdn]\n")
    assert load_recipe(path).quantize == ("mlp", "gdn")
    assert load_recipe(str(path)).calibration == CalibrationSource()


def test_canonical_is_plain_data_with_the_defaults_filled_in() -> None:
    plain = parse_recipe(SOUND, "here").canonical()
    assert plain["in_proj_ab"] == "bf16"
    assert plain["calibration"]["dataset"] == "builtin"
    assert parse_recipe(plain, "again") == parse_recipe(SOUND, "here")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("nvfp4-mtp-vlm").name = "other"


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("nvfp4-mtp-vml", "did you mean nvfp4-mtp-vlm?"), ("xyz", "ending .yaml"), ("../nvfp4.yaml", "cannot be read"), ("", "no recipe ''")],
)
def test_names_that_are_none(asked: str, hint: str) -> None:
    with pytest.raises(InputError) as raised:
        load_recipe(asked)
    assert hint in str(raised.value)
    assert "Shipped: " in str(raised.value) or "mtpress recipes" in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quantise": ["mlp"]}, ["unknown key 'quantise'", "did you mean quantize?", *Recipe.model_fields]),
        ({"x" * 500: 1}, ["unknown key", *Recipe.model_fields]),
        ({"calibration": {"samples": 3}}, ["calibration.samples", *CalibrationSource.model_fields]),
        ({"format": "nvfp8"}, ["format", "'nvfp8'", "'nvfp4'"]),
        ({"quantize": ["mlp", "lm_head"]}, ["quantize.1", "'lm_head'", "'attention', 'gdn' or 'mlp'"]),
        ({"quantize": "mlp"}, ["quantize", "'mlp'"]),
        ({"vision": True}, ["vision", "True"]),
        ({"name": "Not Lower"}, ["name", "Not Lower"]),
        ({"constant_input_scale": -0.5}, ["constant_input_scale", "-0.5"]),
        ({"constant_input_scale": float("nan")}, ["constant_input_scale", "nan"]),
        ({"calibration": {"num_samples": 0}}, ["calibration.num_samples", "0"]),
        ({"calibration": {"num_samples": "20"}}, ["calibration.num_samples", "'20'"]),
        ({"calibration": None}, ["calibration"]),
        ({3: "x"}, ["3"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_valid(change: dict[Any, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as raised:
        parse_recipe({**SOUND, **change}, "my.yaml")
    message = str(raised.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    assert len(message) < 500
    for word in words:
        assert word in message


@pytest.mark.parametrize("key", list(SOUND))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"the key {key} is missing"):
        parse_recipe({k: v for k, v in SOUND.items() if k != key}, "my.yaml")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"a: [1\nb: 2", "not valid YAML at line"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"[" * 2000, "not valid YAML"),
        (b"", "a map of keys"),
        (b"- name", "a map of keys"),
        (b"!!python/object/apply:os.system [true]", "not valid YAML"),
        (b"name: &a mine\nsummary: *a", "a recipe has no aliases"),
        (b"name: mine\nsummary: a\nname: mine", "a key stands twice"),
        (b"calibration: {num_samples: 3, num_samples: 4}", "a key stands twice"),
        (b"name: !!bool mine", "not valid YAML"),
        (b"name: 0x" + b"f" * 5000, "an integer of thousands of digits"),
        (b"name: mine\nsummary: a\nformat: nvfp4\nquantize: [mlp]\nvision: 1" + b":59" * 3000, "an integer of thousands of digits"),
        (b"# " + b"x" * 1_000_001, "too large"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, word: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=word):
        load_recipe(path)
