"""Plans follow from headers and recipe: every tensor has its job, the draft head above all."""

import json
from pathlib import Path

import pytest

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint import Checkpoint
from mtpress.checkpoint_writer import split_into_shards
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.models.qwen3_5 import MTP_TENSORS, component
from mtpress.plan import make_plan
from mtpress.recipe import load_recipe, parse_recipe, shipped
from mtpress.shard_writer import OutputTensor


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint.open(BUILTIN_MODEL)


@pytest.mark.parametrize("recipe", list(shipped()))
def test_every_source_tensor_has_exactly_one_job(recipe: str, source: Checkpoint) -> None:
    plan = make_plan(source, load_recipe(recipe))
    planned = [info.name for job in plan.jobs for info in job.sources]
    assert sorted(planned) == sorted(source.tensors)
    heads = [job for job in plan.jobs if job.component == "mtp"]
    assert {job.sources[0].name for job in heads} == set(MTP_TENSORS)
    assert {job.kind for job in heads} == {"keep"}
    assert {name.removesuffix(".weight") for name in MTP_TENSORS} <= set(plan.ignore)
    assert len(plan.ignore) == len(set(plan.ignore))
    assert not set(plan.ignore) & set(plan.quantized_modules)


def test_steps_stream_in_the_order_of_the_forward(source: Checkpoint) -> None:
    plan = make_plan(source, load_recipe("nvfp4-mtp-vlm"))
    titles = [step.title for step in plan.steps]
    assert titles == ["embeddings", "vision tower", "final norm and lm_head", "draft head", "layer 0", "layer 1", "layer 2", "layer 3"]


def test_planned_layouts_are_the_format_s_own(source: Checkpoint) -> None:
    plan = make_plan(source, load_recipe("nvfp4-mtp-vlm"))
    for job in plan.jobs:
        if job.kind != "quantize":
            continue
        expected = []
        for info in job.sources:
            for suffix, (dtype, shape) in nvfp4.output_tensors(info.shape).items():
                expected.append(OutputTensor(info.name.removesuffix("weight") + suffix, dtype, shape))
        assert list(job.outputs) == expected


def test_components_that_the_recipe_leaves_out_stay_and_are_ignored(source: Checkpoint) -> None:
    recipe = parse_recipe({"name": "mlp-only", "summary": "x", "format": "nvfp4", "quantize": ["mlp"]}, "here")
    plan = make_plan(source, recipe)
    assert {component(f"{name}.weight") for name in plan.quantized_modules} == {"mlp"}
    assert "model.language_model.layers.3.self_attn.q_proj" in plan.ignore
    assert "model.language_model.layers.0.linear_attn.out_proj" in plan.ignore


def test_shards_are_filled_in_order_up_to_their_limit() -> None:
    tensors = [OutputTensor(f"t{i}", "U8", (size,)) for i, size in enumerate((40, 40, 40, 500, 10))]
    shards = split_into_shards([[tensor] for tensor in tensors], max_bytes=100)
    assert [[t.name for t in group] for group in shards.values()] == [["t0", "t1"], ["t2"], ["t3"], ["t4"]]
    assert next(iter(shards)) == "model-00001-of-00004.safetensors"
    assert list(split_into_shards([tensors])) == ["model.safetensors"]


def test_a_source_whose_head_was_lost_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    kept = {n: t for n, t in load_file(BUILTIN_MODEL / "model.safetensors").items() if not n.startswith("mtp.")}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((BUILTIN_MODEL / "config.json").read_text())
    with pytest.raises(InputError, match="graft"):
        make_plan(Checkpoint.open(tmp_path), load_recipe("nvfp4-mtp-vlm"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = make_plan(Checkpoint.open(tmp_path), load_recipe("nvfp4-mtp-vlm"))
    assert not any(name.startswith("mtp.") for name in plan.ignore)
