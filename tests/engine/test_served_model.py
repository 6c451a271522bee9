"""What a server needs to know of a checkpoint, from its headers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Edit
from full_size import make_full_size
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.engine.memory.served_model import ServedModel, num_params, vllm_method
from mtpress.errors import InputError
from mtpress.quant_config.declaration import Declaration


def changed(source: Path, out: Path, **config: Any) -> Path:
    """A copy whose config.json says otherwise; a key set to None is taken out."""
    shutil.copytree(source, out)
    content = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return out


def test_the_27b_layout(tmp_path: Path) -> None:
    make_full_size(tmp_path / "Qwen3.6-27B", sparse=True)
    found = ServedModel.read(tmp_path / "Qwen3.6-27B")
    assert (found.name, found.architecture, found.model_type) == ("Qwen3.6-27B", "Qwen3_5ForConditionalGeneration", "qwen3_5")
    assert (found.format, found.quant_method, found.kv_cache_declared) == ("BF16", None, None)
    assert (found.has_vision, found.needs_language_model_only, found.num_mtp_layers) == (True, False, 1)
    assert (found.max_position_embeddings, found.num_params) == (262144, 27_781_427_952)
    assert {part: round(size / 1e6) for part, size in found.weight_bytes.items()} == {
        "embeddings": 2543, "gdn": 11124, "attention": 3355, "mlp": 34226, "norms": 1, "lm_head": 2543, "mtp": 849, "vision": 921,
    }  # fmt: skip


def test_quantized_builds(small_nvfp4: dict[str, Path], small_bf16: Path) -> None:
    base = ServedModel.read(small_bf16)
    vlm, text, fp8 = (ServedModel.read(small_nvfp4[name]) for name in ("nvfp4-mtp-vlm", "nvfp4-mtp-text", "nvfp4-kvfp8-vlm"))
    assert (vlm.format, vlm.quant_method) == ("modelopt NVFP4 (W4A4)", "modelopt_fp4")
    assert (vlm.kv_cache_declared, fp8.kv_cache_declared) == (None, "fp8")
    assert vlm.num_params == base.num_params
    assert vlm.weight_bytes["mlp"] < 0.6 * base.weight_bytes["mlp"] and vlm.weight_bytes["mtp"] == base.weight_bytes["mtp"]
    assert (text.has_vision, text.needs_language_model_only) == (False, True) and "vision" not in text.weight_bytes
    assert sum(vlm.weight_bytes.values()) == Checkpoint.open(small_nvfp4["nvfp4-mtp-vlm"]).num_bytes


def test_a_lost_tower_is_not_a_stripped_one(small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    found = ServedModel.read(changed(small_nvfp4["nvfp4-mtp-text"], tmp_path / "lost", language_model_only=None))
    assert not found.has_vision and not found.needs_language_model_only


def test_a_draft_head_counts_only_where_it_is_stored(small_bf16: Path, tmp_path: Path) -> None:
    out = changed(small_bf16, tmp_path / "headless")
    kept = {name: "model.safetensors" for name in Checkpoint.open(small_bf16).tensors if not name.startswith("mtp.")}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": kept}))
    assert ServedModel.read(out).num_mtp_layers == 0 and ServedModel.read(small_bf16).num_mtp_layers == 1


@pytest.mark.parametrize(
    ("kind", "title", "method"),
    [
        ("compressed-tensors", "compressed-tensors NVFP4 (W4A4)", "compressed-tensors"),
        ("compressed-tensors-int4", "compressed-tensors INT4 g32", "compressed-tensors"),
        ("auto-round", "AutoRound INT4 g32", "inc"),
        ("gptq", "GPTQ INT4 g32", "auto_gptq"),
        ("modelopt-mixed", "modelopt mixed precision (FP8, NVFP4 W4A4)", "modelopt_mixed"),
    ],
)
def test_builds_of_other_formats(kind: str, title: str, method: str, small_formats: dict[str, Path], small_bf16: Path) -> None:
    found, base = ServedModel.read(small_formats[kind]), ServedModel.read(small_bf16)
    assert (found.format, found.quant_method, found.num_mtp_layers, found.has_vision) == (title, method, 1, True)
    assert found.num_params == base.num_params and not found.lacks_input_scales
    assert found.weight_bytes["mlp"] < 0.6 * base.weight_bytes["mlp"] and found.weight_bytes["mtp"] == base.weight_bytes["mtp"]


@pytest.mark.parametrize(
    ("content", "method"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt_fp4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, "modelopt_fp4"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "modelopt_mixed"),
        ({"quant_method": "auto-round", "bits": 4}, "inc"),
        ({"quant_method": "compressed_tensors"}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "auto_gptq"),
        ({"bits": 4}, None),
    ],
)
def test_the_word_that_vllm_settles_on(content: dict[str, Any], method: str | None) -> None:
    assert vllm_method(Declaration("config.json", content)) == method


def test_scales_are_no_parameters(small_nvfp4: dict[str, Path]) -> None:
    tensors = Checkpoint.open(small_nvfp4["nvfp4-mtp-vlm"]).tensors
    weight = next(name for name, info in tensors.items() if info.dtype == "U8")
    assert num_params("weight", tensors[weight]) == 2 * tensors[weight].num_params
    assert num_params("weight_scale", tensors[f"{weight}_scale"]) == 0


def test_what_is_no_checkpoint(tmp_path: Path, small_bf16: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        ServedModel.read(tmp_path / "nothing")
    with pytest.raises(InputError, match="model_type 'llama' is not supported"):
        ServedModel.read(changed(small_bf16, tmp_path / "llama", model_type="llama"))


def test_weight_only_linears_of_modelopt_lack_what_vllm_counts(small_formats: dict[str, Path], tmp_path: Path) -> None:
    edit = Edit(Path(shutil.copytree(small_formats["modelopt-mixed"], tmp_path / "w4a16")))
    for name, entry in edit.quantization["quantized_layers"].items():
        if entry["quant_algo"] == "NVFP4":
            entry["quant_algo"] = "W4A16_NVFP4"
            del edit.tensors[f"{name}.input_scale"]
    edit.save()
    assert ServedModel.read(edit.path).lacks_input_scales
    assert not ServedModel.read(small_formats["compressed-tensors-w4a16"]).lacks_input_scales
