"""Formats by component, and overrides: what each linear gets, and what is refused in the first second."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.models.qwen3_5.names import module_of
from mtpress.plan.plan import Plan, make_plan
from mtpress.plan.recipe import Recipe, load_recipe, parse_recipe, shipped
from mtpress.quantization.output_files import config_files

LAYER = "model.language_model.layers."
NVIDIA = {"mlp": "nvfp4", "attention": "fp8", "gdn": "fp8"}


def recipe(formats: Any = NVIDIA, **more: Any) -> Recipe:
    return parse_recipe({"name": "mine", "summary": "x", "formats": formats, **more}, "here")


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint.open(BUILTIN_MODEL)


def planned(source: Checkpoint, **more: Any) -> Plan:
    return make_plan(source, recipe(**more))


def test_each_component_gets_its_format(source: Checkpoint) -> None:
    plan = planned(source)
    assert Counter(plan.formats.values()) == {"nvfp4": 12, "fp8": 13}
    for module, chosen in plan.formats.items():
        assert chosen == ("nvfp4" if ".mlp." in module else "fp8")
    outputs = {tensor.name: tensor.dtype for job in plan.jobs for tensor in job.outputs}
    assert outputs[f"{LAYER}3.self_attn.q_proj.weight"] == "F8_E4M3" and outputs[f"{LAYER}3.self_attn.q_proj.weight_scale"] == "F32"
    assert outputs[f"{LAYER}0.mlp.up_proj.weight"] == "U8"


def test_weight_only_linears_have_no_input_scale(source: Checkpoint) -> None:
    plan = planned(source, formats={"mlp": "nvfp4_w4a16", "lm_head": "nvfp4_w4a16"})
    names = {tensor.name for job in plan.jobs for tensor in job.outputs}
    assert not [name for name in names if name.endswith("input_scale")]
    assert {"lm_head.weight_scale", "lm_head.weight_scale_2"} < names
    assert "lm_head" in plan.formats and "lm_head" not in plan.ignore
    assert list(plan.formats)[-1] == "lm_head"


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        ({"layers.0": "bf16"}, {(0, "linear_attn"): "bf16", (0, "mlp"): "bf16"}),
        ({"model.language_model.layers.0": "bf16"}, {(0, "linear_attn"): "bf16", (0, "mlp"): "bf16"}),
        ({"layers.1-3.mlp": "fp8"}, {(1, "mlp"): "fp8", (2, "mlp"): "fp8", (3, "mlp"): "fp8"}),
        (
            {"layers.1-3.mlp": "fp8", "layers.2": "bf16"},
            {(1, "mlp"): "fp8", (2, "linear_attn"): "bf16", (2, "mlp"): "bf16", (3, "mlp"): "fp8"},
        ),
        ({"*.self_attn": "nvfp4_w4a16"}, {(3, "self_attn"): "nvfp4_w4a16"}),
    ],
)  # fmt: skip
def test_overrides(overrides: dict[str, str], changed: dict[tuple[int, str], str], source: Checkpoint) -> None:
    before, after = planned(source).formats, planned(source, overrides=overrides).formats
    for module, chosen in before.items():
        layer, part = module.removeprefix(LAYER).split(".")[:2]
        assert after.get(module, "bf16") == changed.get((int(layer), part), chosen), module
    assert not after.keys() - before.keys()


def test_islands_of_a_single_linear(source: Checkpoint) -> None:
    plan = planned(source, overrides={"*.linear_attn.out_proj": "bf16"})
    islands = {f"{LAYER}{i}.linear_attn.out_proj" for i in range(3)}
    assert islands <= set(plan.ignore) and not islands & plan.formats.keys()
    assert {f"{module}.weight" for module in islands} <= {job.outputs[0].name for job in plan.jobs if job.kind == "keep"}


def test_bytes_by_format_add_up(source: Checkpoint) -> None:
    plan = planned(source, formats={**NVIDIA, "lm_head": "nvfp4_w4a16"}, overrides={"layers.0.mlp": "bf16"})
    for part, sizes in plan.bytes_by_format.items():
        assert sum(sizes.values()) == plan.bytes_by_component[part]
    assert plan.bytes_by_format["mlp"].keys() == {"nvfp4", "bf16"}
    assert plan.bytes_by_format["mtp"].keys() == plan.bytes_by_format["vision"].keys() == {"bf16"}
    assert plan.bytes_by_format["lm_head"].keys() == {"nvfp4_w4a16"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"overrides": {"layers.9": "bf16"}}, ["'layers.9' matches no quantized linear", "near: layers.3, layers.2, layers.1"]),
        ({"overrides": {"*.linear_atn.out_proj": "bf16"}}, ["matches no quantized linear", "near: *.linear_attn.out_proj"]),
        ({"overrides": {"layers.2-7": "bf16"}}, ["'layers.2-7' matches no quantized linear"]),
        ({"overrides": {"layers.3-1": "bf16"}}, ["goes upwards"]),
        ({"overrides": {"*.in_proj_a": "bf16"}}, ["matches no quantized linear"]),
        ({"overrides": {"mtp.layers.0": "fp8"}}, ["matches no quantized linear"]),
        ({"overrides": {"*.q_proj": "nvfp4"}}, ["layers.3.self_attn.qkv_proj", "q_proj nvfp4, k_proj fp8, v_proj fp8", "override all"]),
        ({"overrides": {"*.in_proj_z": "bf16"}}, ["in_proj_qkvz", "in_proj_qkv fp8, in_proj_z bf16"]),
        ({"overrides": {"layers.0-3": "bf16"}}, ["`overrides` leaves nothing quantized"]),
        ({"formats": {"mlp": "nvfp4", "lm_head": "nvfp4_w4a16"}, "overrides": {"*": "fp8"}}, ["lm_head", "there is no input_scale"]),
        ({"formats": {"mlp": "bf16"}}, ["`formats` names no component"]),
    ],
)  # fmt: skip
def test_what_is_refused_in_the_plan(more: dict[str, Any], words: list[str], source: Checkpoint) -> None:
    with pytest.raises(InputError) as raised:
        planned(source, **more)
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_a_tied_lm_head_has_no_format(tmp_path: Path) -> None:
    source = Checkpoint.open(BUILTIN_MODEL)
    tied = {name: info for name, info in source.tensors.items() if name != "lm_head.weight"}
    object.__setattr__(source, "tensors", tied)
    object.__setattr__(source, "config", {**source.config, "tie_word_embeddings": True})
    with pytest.raises(InputError, match="lm_head is tied to the embeddings"):
        planned(source, formats={"lm_head": "nvfp4_w4a16", "mlp": "nvfp4"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"formats": NVIDIA, "format": "nvfp4"}, ["`formats` stands in place of"]),
        ({"formats": NVIDIA, "quantize": ["mlp"]}, ["`formats` stands in place of"]),
        ({"format": "mixed", "quantize": ["mlp"]}, ["`formats` stands in place of"]),
        ({"formats": {"mpl": "fp8"}}, ["unknown key 'formats.mpl'", "did you mean mlp?"]),
        ({"formats": {"mlp": "int4"}}, ["formats.mlp", "'int4'", "'nvfp4'"]),
        ({"formats": {"lm_head": "fp8", "mlp": "fp8"}}, ["formats.lm_head", "'fp8'"]),
        ({"formats": NVIDIA, "constant_input_scale": 0.1}, ["constant_input_scale", "FP8 divides by 448"]),
        ({"format": "nvfp4", "quantize": ["mlp"], "overrides": {"layers.0": "fp8"}}, ["overrides", "no other but bf16"]),
        ({"formats": NVIDIA, "rounding": "rtn"}, ["rounding", "does not go with format mixed"]),
        ({"formats": []}, ["formats"]),
    ],
)  # fmt: skip
def test_what_a_recipe_cannot_say(content: dict[str, Any], words: list[str]) -> None:
    content = {**content, "quantize": tuple(content["quantize"])} if "quantize" in content else content
    with pytest.raises(InputError) as raised:
        parse_recipe({"name": "mine", "summary": "x", **content}, "here")
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize("kind", ["nvfp4", "int4"])
def test_islands_of_one_format(kind: str, source: Checkpoint) -> None:
    content = {"name": "mine", "summary": "x", "format": kind, "quantize": ["mlp", "gdn"], "overrides": {"layers.0": "bf16"}}
    plan = make_plan(source, parse_recipe(content, "here"))
    assert set(plan.formats.values()) == {kind}
    assert not [module for module in plan.formats if ".layers.0." in module]
    assert f"{LAYER}0.mlp.up_proj" in plan.ignore


def test_which_need_samples() -> None:
    assert recipe().needs_samples
    assert not recipe(formats={"mlp": "nvfp4_w4a16", "lm_head": "nvfp4_w4a16"}).needs_samples
    assert recipe(formats={"mlp": "nvfp4_w4a16"}, overrides={"layers.0": "fp8"}).needs_samples


def test_a_mixed_recipe_comes_back_from_its_record() -> None:
    made = recipe(overrides={"layers.0": "bf16", "*.mlp": "fp8"})
    assert Recipe.model_validate_json(json.dumps(made.canonical())) == made
    assert parse_recipe(made.canonical(), "again") == made
    assert made.canonical() != recipe(overrides={"*.mlp": "fp8", "layers.0": "bf16"}).canonical(), "the later wins"


def test_recipes_of_one_format_say_nothing_of_formats() -> None:
    """Runs that were begun before these keys were known are still the same."""
    for name in shipped():
        found = load_recipe(name)
        assert ("formats" in found.canonical()) == (found.format == "mixed")
        assert "overrides" not in found.canonical()


def declared(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    files = {name: json.loads(content) for name, content in config_files(plan).items()}
    return files["config.json"]["quantization_config"], files["hf_quant_config.json"]["quantization"]


def test_mixed_precision_is_declared_in_both_files(source: Checkpoint) -> None:
    plan = planned(source, kv_cache="fp8_cast")
    config, beside = declared(plan)
    assert config["quant_algo"] == beside["quant_algo"] == "MIXED_PRECISION"
    assert config["quantized_layers"] == beside["quantized_layers"]
    assert list(config["quantized_layers"]) == list(plan.formats)
    assert config["ignore"] == beside["exclude_modules"] == list(plan.ignore)
    assert config["kv_cache_scheme"]["num_bits"] == 8 and beside["kv_cache_quant_algo"] == "FP8"
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(plan.formats) and "group_size" not in beside
    kept = {module_of(job.sources[0].name) for job in plan.jobs if job.component in ("mtp", "vision")}
    assert not kept & set(targets)


@pytest.mark.parametrize(
    ("formats", "algo", "group"),
    [
        (dict.fromkeys(("mlp", "gdn", "attention"), "nvfp4"), "NVFP4", {"input_activations", "weights", "targets"}),
        ({"mlp": "nvfp4_w4a16", "lm_head": "nvfp4_w4a16"}, "W4A16_NVFP4", {"weights", "targets"}),
        (dict.fromkeys(("mlp", "gdn", "attention"), "fp8"), "FP8", {"input_activations", "weights", "targets"}),
    ],
)  # fmt: skip
def test_one_format_is_declared_as_modelopt_does(formats: dict[str, str], algo: str, group: set[str], source: Checkpoint) -> None:
    config, beside = declared(planned(source, formats=formats))
    assert config["quant_algo"] == beside["quant_algo"] == algo
    assert config["config_groups"].keys() == {"group_0"} and config["config_groups"]["group_0"].keys() == group
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "quantized_layers" not in {**config, **beside}
    assert beside.get("group_size") == (None if algo == "FP8" else 16)


def test_all_in_nvfp4_is_what_the_plain_recipe_declares(source: Checkpoint) -> None:
    plain = parse_recipe({"name": "mine", "summary": "x", "format": "nvfp4", "quantize": ["mlp", "gdn", "attention"]}, "here")
    made = planned(source, formats=dict.fromkeys(("mlp", "gdn", "attention"), "nvfp4"))
    assert declared(made) == declared(make_plan(source, plain))
    assert made.shards == make_plan(source, plain).shards
