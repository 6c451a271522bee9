import json
from pathlib import Path
from typing import Any

import pytest

from mtpress.errors import InputError
from mtpress.plan.recipe import GPTQ_SCALES, CalibrationSource, GenerationConfig, Recipe, load_recipe, parse_recipe, recipe_file, shipped

SOUND: dict[str, Any] = {"name": "mine", "summary": "a test", "format": "nvfp4", "quantize": ["mlp"]}


def test_every_shipped_recipe_loads_under_its_file_name() -> None:
    names = list(shipped())
    assert {"nvfp4-mtp-vlm", "nvfp4-mtp-text", "nvfp4-kvfp8-vlm", "int4-autoround-mtp", "int4-mtp-vlm", "nvfp4-cascade-vlm"} <= set(names)
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


def test_the_rounding_follows_from_the_format() -> None:
    assert parse_recipe(SOUND, "here").rounding == "max"
    int4 = parse_recipe({**SOUND, "format": "int4"}, "here")
    assert (int4.rounding, int4.signround.iterations, int4.signround.batch_size) == ("signround", 200, 8)
    assert parse_recipe({**SOUND, "format": "int4", "signround": {"iterations": 5}}, "here").signround.iterations == 5


def test_the_scales_of_gptq_follow_from_the_format() -> None:
    chosen = parse_recipe({**SOUND, "rounding": "gptq"}, "here")
    assert chosen.canonical()["gptq"] == {"scales": GPTQ_SCALES["nvfp4"][0], "damping": 0.05}
    assert parse_recipe(chosen.canonical(), "again") == chosen
    int4 = parse_recipe({**SOUND, "format": "int4", "rounding": "gptq", "gptq": {"damping": 0.1}}, "here")
    assert int4.canonical()["gptq"] == {"scales": GPTQ_SCALES["int4"][0], "damping": 0.1}
    assert "gptq" not in parse_recipe(SOUND, "here").canonical()


def test_settings_of_another_rounding_are_no_part_of_a_recipe() -> None:
    """Runs are compared by it: an NVFP4 run that was begun before INT4 was known is still the same."""
    assert "signround" not in parse_recipe(SOUND, "here").canonical()
    for name in shipped():
        recipe = load_recipe(name)
        assert ("signround" in recipe.canonical()) == (recipe.rounding == "signround")
        assert parse_recipe(recipe.canonical(), "again") == recipe


def test_several_sources_of_samples() -> None:
    images, text = {"dataset": "a/b", "subset": "c", "num_samples": 3}, {"dataset": "builtin", "max_seq_len": 9}
    recipe = parse_recipe({**SOUND, "calibration": [images, text]}, "here")
    assert recipe.calibration_sources == (CalibrationSource(**images), CalibrationSource(**text))
    for again in (parse_recipe(recipe.canonical(), "again"), Recipe.model_validate_json(json.dumps(recipe.canonical()))):
        assert again == recipe
    one = parse_recipe({**SOUND, "calibration": images}, "here")
    assert one.calibration_sources == (CalibrationSource(**images),)
    assert one.canonical()["calibration"] == CalibrationSource(**images).model_dump()


def test_recipes_of_before_are_the_same_data() -> None:
    """Runs that were begun are gone on with only under an equal recipe."""
    found = load_recipe("nvfp4-kvfp8-vlm").canonical()
    assert found["calibration"] == {
        "dataset": "abisee/cnn_dailymail", "subset": "3.0.0", "split": "train", "num_samples": 128, "max_seq_len": 8192,
    }  # fmt: skip
    assert found["kv_cache"] == "fp8_cast"


def test_the_mixed_recipe_has_as_many_pictures_as_text() -> None:
    sources = load_recipe("nvfp4-mixed-vlm").calibration_sources
    pictures = [source.num_samples for source in sources if "VLM" in source.dataset]
    assert len(pictures) == 3 and sum(pictures) == 128
    assert [source.num_samples for source in sources if "VLM" not in source.dataset] == [128]


@pytest.mark.parametrize(
    ("change", "needed"),
    [
        ({}, True),
        ({"constant_input_scale": 0.1}, False),
        ({"rounding": "gptq"}, True),
        ({"format": "int4", "rounding": "gptq"}, True),
        ({"format": "int4"}, True),
        ({"rounding": "sweep"}, True),
        ({"rounding": "hessian"}, True),
        ({"rounding": "sweep", "constant_input_scale": 0.1}, False),
        ({"rounding": "four-over-six", "constant_input_scale": 0.1}, False),
        ({"format": "int4", "rounding": "hessian"}, True),
        ({"format": "int4", "rounding": "search"}, False),
        ({"format": "int4", "rounding": "rtn"}, False),
    ],
)
def test_which_builds_need_samples(change: dict[str, Any], needed: bool) -> None:
    assert parse_recipe({**SOUND, **change}, "here").needs_samples is needed


def test_template_and_sampling_of_the_shipped_recipes() -> None:
    """The builds whose releases came with a template of their own, and the best, install ours; the others keep the source's."""
    ours = {name for name in shipped() if load_recipe(name).chat_template == "mtpress"}
    assert ours == {"nvfp4-mtp-vlm", "nvfp4-cascade-vlm", "nvfp4-best-vlm", "nvfp4-best-text"}
    sampling = {name: recipe.generation_config.said() for name in shipped() if (recipe := load_recipe(name)).generation_config}
    assert sampling == {"nvfp4-cascade-vlm": {"temperature": 0.7, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True}}


def test_keys_that_change_nothing_are_no_part_of_a_run() -> None:
    assert not parse_recipe(SOUND, "here").canonical().keys() & {"chat_template", "generation_config"}
    chosen = parse_recipe({**SOUND, "chat_template": "mtpress", "generation_config": {"temperature": 1}}, "here")
    assert chosen.canonical() == {
        **parse_recipe(SOUND, "here").canonical(), "chat_template": "mtpress", "generation_config": {"temperature": 1.0, "do_sample": True},
    }  # fmt: skip
    assert parse_recipe(chosen.canonical(), "again").canonical() == chosen.canonical()


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
        ({"format": "nvfp8"}, ["format", "'nvfp8'", "'nvfp4', 'int4' or 'mixed'"]),
        ({"format": None}, ["format", "'None'"]),
        ({"rounding": "mse"}, ["rounding", "'mse'", "'max', 'four-over-six', 'sweep', 'hessian', 'gptq', 'signround', 'search' or 'rtn'"]),
        ({"rounding": "search"}, ["rounding: 'search' does not go with format nvfp4; valid: max, four-over-six, sweep, hessian, gptq"]),
        (
            {"format": "int4", "rounding": "max"},
            ["'max' does not go with format int4; valid: signround, search, hessian, gptq, rtn"],
        ),
        ({"rounding": "hessian", "constant_input_scale": 0.1}, ["rounding hessian, which needs samples; take rounding sweep"]),
        ({"formats": {"mlp": "nvfp4"}, "format": "mixed", "rounding": "gptq"}, ["'gptq' does not go with format mixed", "max"]),
        ({"gptq": {"scales": "max"}}, ["gptq has settings of rounding gptq, not of max; leave it out"]),
        (
            {"rounding": "gptq", "gptq": {"scales": "search"}},
            ["gptq.scales: 'search' does not go with", "hessian, sweep, four-over-six, max"],
        ),
        (
            {"format": "int4", "rounding": "gptq", "gptq": {"scales": "max"}},
            ["gptq.scales: 'max'", "valid: hessian, search, rtn"],
        ),
        ({"rounding": "gptq", "gptq": {"scales": "best"}}, ["gptq.scales", "'best'", "'max'"]),
        ({"rounding": "gptq", "gptq": {"damp": 0.1}}, ["unknown key 'gptq.damp'", "did you mean damping?", "scales, damping"]),
        ({"rounding": "gptq", "gptq": {"damping": 0}}, ["gptq.damping", "0"]),
        ({"rounding": "gptq", "gptq": {"damping": float("nan")}}, ["gptq.damping", "nan"]),
        ({"rounding": "gptq", "gptq": [0.1]}, ["gptq", "[0.1]"]),
        ({"rounding": "gptq", "constant_input_scale": 0.1}, ["constant_input_scale needs no samples, rounding gptq is by samples"]),
        ({"format": "int4", "kv_cache": "fp8_cast"}, ["kv_cache: 'fp8_cast' does not go with format int4; valid: auto"]),
        ({"format": "int4", "in_proj_ab": "nvfp4"}, ["in_proj_ab: 'nvfp4' does not go with format int4; valid: bf16"]),
        ({"format": "int4", "constant_input_scale": 0.1}, ["constant_input_scale does not go with format int4", "search or rtn"]),
        (
            {"format": "int4", "rounding": "rtn", "signround": {"iterations": 9}},
            ["signround has settings of rounding signround, not of rtn"],
        ),
        ({"signround": {}}, ["signround has settings of rounding signround, not of max"]),
        ({"format": "int4", "signround": {"iters": 9}}, ["signround.iters", "iterations", "batch_size"]),
        ({"format": "int4", "signround": {"iterations": 0}}, ["signround.iterations", "0"]),
        ({"format": "int4", "signround": {"batch_size": True}}, ["signround.batch_size", "True"]),
        ({"quantize": ["mlp", "lm_head"]}, ["quantize.1", "'lm_head'", "'attention', 'gdn' or 'mlp'"]),
        ({"quantize": "mlp"}, ["quantize", "'mlp'"]),
        ({"vision": True}, ["vision", "True"]),
        ({"name": "Not Lower"}, ["name", "Not Lower"]),
        ({"constant_input_scale": -0.5}, ["constant_input_scale", "-0.5"]),
        ({"constant_input_scale": float("nan")}, ["constant_input_scale", "nan"]),
        ({"calibration": {"num_samples": 0}}, ["calibration.num_samples", "0"]),
        ({"calibration": {"num_samples": "20"}}, ["calibration.num_samples", "'20'"]),
        ({"calibration": None}, ["calibration"]),
        ({"calibration": []}, ["calibration"]),
        ({"calibration": [{"samples": 3}]}, ["calibration.0.samples", *CalibrationSource.model_fields]),
        ({"calibration": [{}, {"num_samples": 0}]}, ["calibration.1.num_samples", "0"]),
        ({"kv_cache": "fp8", "constant_input_scale": 0.1}, ["kv_cache: 'fp8' takes its scales from samples", "take fp8_cast"]),
        ({"format": "int4", "kv_cache": "fp8"}, ["kv_cache: 'fp8' does not go with format int4; valid: auto"]),
        ({"chat_template": "ours"}, ["chat_template", "'ours'", "'source' or 'mtpress'"]),
        ({"generation_config": {"temprature": 1}}, ["did you mean temperature?", *GenerationConfig.model_fields]),
        ({"generation_config": {"eos_token_id": 3}}, ["unknown key 'generation_config.eos_token_id'", *GenerationConfig.model_fields]),
        ({"generation_config": {"temperature": 0}}, ["generation_config.temperature: 0.0 is greedy decoding", "the request that wants it"]),
        ({"generation_config": {"do_sample": False}}, ["generation_config.do_sample: False is greedy decoding"]),
        ({"generation_config": {"top_k": 1}}, ["generation_config.top_k: 1 is greedy decoding"]),
        ({"generation_config": {"temperature": 2.5}}, ["generation_config.temperature", "2.5"]),
        ({"generation_config": {"top_p": 0}}, ["generation_config.top_p", "0"]),
        ({"generation_config": {"top_p": float("nan")}}, ["generation_config.top_p", "nan"]),
        ({"generation_config": {"top_k": 2.5}}, ["generation_config.top_k", "2.5"]),
        ({"generation_config": {"repetition_penalty": "1.1"}}, ["generation_config.repetition_penalty", "'1.1'"]),
        ({"generation_config": []}, ["generation_config"]),
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
