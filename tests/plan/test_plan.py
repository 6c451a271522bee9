"""Plans follow from headers and recipe: every tensor has its job, the draft head above all."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.checkpoint.writer import split_into_shards
from mtpress.errors import InputError
from mtpress.formats import int4, nvfp4
from mtpress.models.qwen3_5.names import MTP_TENSORS, body_shapes, component, mtp_shapes, vision_shapes
from mtpress.plan.plan import INT4_GROUP_SIZE, LAYOUTS, NVFP4_GROUP_SIZE, make_plan
from mtpress.plan.recipe import CHOICES, LinearFormat, load_recipe, parse_recipe, shipped

FORMATS_OF_LINEARS = get_args(LinearFormat)


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


@pytest.mark.parametrize(("recipe", "layout"), [("nvfp4-mtp-vlm", nvfp4), ("int4-mtp-vlm", int4)])
def test_planned_layouts_are_the_format_s_own(recipe: str, layout: Any, source: Checkpoint) -> None:
    plan = make_plan(source, load_recipe(recipe))
    for job in plan.jobs:
        if job.kind != "quantize":
            continue
        expected = []
        for info in job.sources:
            for suffix, (dtype, shape) in layout.output_tensors(info.shape).items():
                expected.append(OutputTensor(info.name.removesuffix("weight") + suffix, dtype, shape))
        assert list(job.outputs) == expected


def test_formats_take_what_their_modules_say() -> None:
    assert (NVFP4_GROUP_SIZE, INT4_GROUP_SIZE) == (nvfp4.GROUP_SIZE, int4.GROUP_SIZE)
    assert (LAYOUTS["nvfp4"].k_multiple, LAYOUTS["nvfp4"].n_multiple) == (nvfp4.GROUP_SIZE, 1)
    assert (LAYOUTS["int4"].k_multiple, LAYOUTS["int4"].n_multiple) == (int4.GROUP_SIZE, int4.ROWS_MULTIPLE)
    assert (LAYOUTS["fp8"].k_multiple, LAYOUTS["fp8"].n_multiple) == (1, 1)
    assert set(LAYOUTS) == {*CHOICES, *FORMATS_OF_LINEARS} - {"mixed", "bf16"}


INT4 = load_recipe("int4-mtp-vlm")
LAYER = "model.language_model.layers.{}."


@pytest.mark.parametrize(
    ("size", "value", "linears"),
    [
        # down_proj has K = intermediate_size; gate_proj and up_proj have it as N, which INT4 takes by 32
        ("intermediate_size", 352, ["mlp.down_proj"]),
        # by neither: gate_proj and up_proj stay too, all of the MLP
        ("intermediate_size", 360, ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    ],
)
def test_linears_that_int4_cannot_hold_stay_with_their_fused_group(size: str, value: int, linears: list[str], tmp_path: Path) -> None:
    plan = make_plan(Checkpoint.open(resized(tmp_path, {size: value})), INT4)
    misfits = {LAYER.format(i) + linear for i in range(4) for linear in linears}
    assert set(plan.misfits) == misfits and len(plan.misfits) == len(misfits)
    assert misfits <= set(plan.ignore) and misfits <= set(plan.kept_linears)
    assert not misfits & set(plan.quantized_modules)
    assert {f"{name}.weight" for name in misfits} <= {tensor.name for job in plan.jobs if job.kind == "keep" for tensor in job.outputs}
    assert LAYER.format(3) + "self_attn.q_proj" in plan.quantized_modules


def test_one_misfit_keeps_its_fused_group(tmp_path: Path) -> None:
    """out_proj has K = the value heads' size, in_proj_z as many rows: 96 is by 32 and not by 128, 72 by neither."""
    plan = make_plan(Checkpoint.open(resized(tmp_path, {"linear_num_value_heads": 1, "linear_value_head_dim": 96})), INT4)
    assert {name.split("linear_attn.")[1] for name in plan.misfits if "layers.0." in name} == {"out_proj"}
    plan = make_plan(Checkpoint.open(resized(tmp_path / "b", {"linear_num_value_heads": 1, "linear_value_head_dim": 72})), INT4)
    assert {name.split("linear_attn.")[1] for name in plan.misfits if "layers.0." in name} == {"in_proj_qkv", "in_proj_z", "out_proj"}


def test_nvfp4_refuses_what_it_cannot_hold_and_int4_a_model_of_which_it_can_hold_nothing(tmp_path: Path) -> None:
    source = Checkpoint.open(resized(tmp_path, {"intermediate_size": 360}))
    with pytest.raises(InputError, match=r"K = 360 is no multiple of 16, NVFP4 cannot hold it; leave mlp out"):
        make_plan(source, load_recipe("nvfp4-mtp-vlm"))
    only = parse_recipe({"name": "mlp-only", "summary": "x", "format": "int4", "quantize": ["mlp"]}, "here")
    with pytest.raises(InputError, match=r"none of its 12 linears has N by 32 and K by 128, as INT4 needs"):
        make_plan(source, only)


def test_kept_linears_are_the_matrices_that_multiply(source: Checkpoint) -> None:
    plan = make_plan(source, INT4)
    assert set(plan.kept_linears) < set(plan.ignore)
    assert {name for name in plan.ignore if name not in plan.kept_linears} == {
        "model.language_model.embed_tokens", "model.visual.pos_embed", "model.visual.patch_embed.proj", "mtp.norm",
        "mtp.pre_fc_norm_hidden", "mtp.pre_fc_norm_embedding", "mtp.layers.0.input_layernorm", "mtp.layers.0.post_attention_layernorm",
        "mtp.layers.0.self_attn.q_norm", "mtp.layers.0.self_attn.k_norm", *(LAYER.format(i) + "linear_attn.conv1d" for i in range(3)),
    }  # fmt: skip


def resized(directory: Path, sizes: dict[str, int]) -> Path:
    """mtpress-tiny's layout with other sizes: headers and holes, no numbers."""
    config = json.loads((BUILTIN_MODEL / "config.json").read_text())
    config["text_config"] |= sizes
    prefix = "model.language_model."
    shapes = dict(body_shapes(config, prefix)) | mtp_shapes(config) | vision_shapes(config)
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    content = json.dumps(header).encode()
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


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
