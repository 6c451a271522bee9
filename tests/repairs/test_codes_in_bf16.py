"""What no engine loads, in BF16 again by its own codes: the numbers, what is said of them, and nothing of this machine in the words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import FP8_BLOCK, PREFIX, Edit, in_fp8
from mtpress.formats import fp8, nvfp4
from mtpress.stages.check import check
from mtpress.stages.repair import RepairResult, repair

EMBED = f"{PREFIX}embed_tokens"


def repaired(edit: Edit, out: Path) -> tuple[RepairResult, dict[str, torch.Tensor]]:
    edit.save()
    result = repair(edit.path, out, silent=True)
    assert result.sound, [finding.message for finding in result.findings]
    said = json.dumps(result.as_json()["fixed"])
    assert "/" not in said.replace("W4A4/", "") and "not computed" not in said
    return result, load_file(out / "model.safetensors")


@pytest.mark.parametrize("power_of_two", [True, False])
def test_embeddings_in_fp8_blocks(power_of_two: bool, small_bf16: Path, tmp_path: Path) -> None:
    """As a build of the 27B is published: only they are quantized, and the config spares nothing. Nothing is, afterwards."""
    e = Edit(Path(shutil.copytree(small_bf16, tmp_path / "fp8")))
    in_fp8(e, EMBED, block=FP8_BLOCK)
    name = f"{EMBED}.weight_scale_inv"
    if power_of_two:
        e.tensors[name] = torch.exp2(e.tensors[name].float().log2().round())
    e.config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    expected = fp8.dequantize(e.tensors[f"{EMBED}.weight"], e.tensors[name], (FP8_BLOCK, FP8_BLOCK)).bfloat16()
    result, made = repaired(e, tmp_path / "out")
    assert torch.equal(made[f"{EMBED}.weight"], expected)
    assert name not in made
    assert check(result.out, silent=True).format == "BF16"
    how = result.fixed[0].fixed[0].how
    assert how.endswith("to the last bit" if power_of_two else "rounded to 8 bits")


def test_embeddings_in_nvfp4_that_nothing_declares(small_bf16: Path, tmp_path: Path) -> None:
    e = Edit(Path(shutil.copytree(small_bf16, tmp_path / "nvfp4")))
    weight = e.tensors[f"{EMBED}.weight"]
    scale_2 = nvfp4.global_scale(nvfp4.amax(weight))
    codes, scales = nvfp4.quantize(weight, scale_2)
    e.tensors |= {f"{EMBED}.weight": codes, f"{EMBED}.weight_scale": scales, f"{EMBED}.weight_scale_2": scale_2}
    _, made = repaired(e, tmp_path / "out")
    assert torch.equal(made[f"{EMBED}.weight"], nvfp4.dequantize(codes, scales, scale_2).bfloat16())


def test_an_lm_head_that_quant_method_fp8_cannot_hold(small_formats: dict[str, Path], tmp_path: Path) -> None:
    e = Edit(Path(shutil.copytree(small_formats["fp8"], tmp_path / "fp8")))
    in_fp8(e, "lm_head", block=FP8_BLOCK)
    e.quantization["modules_to_not_convert"].remove("lm_head")
    expected = fp8.to_bf16(e.tensors["lm_head.weight"], e.tensors["lm_head.weight_scale_inv"], (FP8_BLOCK, FP8_BLOCK))[0]
    result, made = repaired(e, tmp_path / "out")
    assert torch.equal(made["lm_head.weight"], expected)
    assert "lm_head" in json.loads((Path(result.out) / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]


def test_codes_that_lack_their_scale_are_left(small_bf16: Path, tmp_path: Path) -> None:
    e = Edit(Path(shutil.copytree(small_bf16, tmp_path / "fp8")))
    in_fp8(e, EMBED, block=FP8_BLOCK)
    del e.tensors[f"{EMBED}.weight_scale_inv"]
    e.save()
    result = repair(e.path, tmp_path / "out", silent=True)
    assert not result.sound
    left = next(outcome.left[0] for outcome in result.left if outcome.finding.id == "weight-dtype")
    assert "--base SRC" in left.takes


def test_the_kv_cache_stays_declared_in_the_only_file_that_declares_it(small_formats: dict[str, Path], tmp_path: Path) -> None:
    """Whatever else repair writes anew: engines that read hf_quant_config.json alone go by it."""
    e = Edit(Path(shutil.copytree(small_formats["modelopt-mixed"], tmp_path / "mixed")))
    assert e.hf is not None
    e.hf["quantization"]["kv_cache_quant_algo"] = "FP8"
    e.without(lambda name: name == "lm_head")
    for layers in (e.quantization["quantized_layers"], e.hf["quantization"]["quantized_layers"]):
        del layers[f"{PREFIX}layers.0.mlp.down_proj"]
    result, _ = repaired(e, tmp_path / "out")
    written = json.loads((Path(result.out) / "hf_quant_config.json").read_text())
    assert written["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert "kv_cache_scheme" not in json.loads((Path(result.out) / "config.json").read_text())["quantization_config"]
    assert [finding.id for finding in result.findings] == ["kv-cache-in-one-file"]
