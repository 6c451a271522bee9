"""BF16 and text-only checkpoints, and formats that the rules do not know: recognised, and checked as far as the rules go."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import PREFIX, Edit, pack_int4
from mtpress.rules.rule import Finding
from mtpress.stages.check import CheckResult, check

INT8 = {"num_bits": 8, "type": "int"}
MLP = [f"{PREFIX}layers.{i}.mlp.{name}" for i in range(4) for name in ("gate_proj", "up_proj", "down_proj")]


@pytest.fixture
def edit(small_nvfp4: dict[str, Path], tmp_path: Path) -> Edit:
    """A sound NVFP4 checkpoint to be changed."""
    return Edit(Path(shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "other")))


@pytest.fixture
def bf16(small_bf16: Path, tmp_path: Path) -> Edit:
    """A sound BF16 checkpoint to be changed."""
    return Edit(Path(shutil.copytree(small_bf16, tmp_path / "bf16")))


def checked(edit: Edit) -> tuple[CheckResult, dict[str, Finding]]:
    edit.save()
    result = check(edit.path, silent=True)
    return result, {finding.id: finding for finding in result.findings}


def test_bf16(bf16: Edit) -> None:
    result, found = checked(bf16)
    assert found == {}
    assert (result.format, result.num_quantized, result.sound) == ("BF16", 0, True)


BF16_BREAKS: dict[str, Callable[[Edit], object]] = {
    "mtp-missing": lambda e: [e.tensors.pop(n) for n in list(e.tensors) if n.startswith("mtp.")],
    "tokenizer-backend": lambda e: e.change("tokenizer_config.json", backend="tokenizers"),
    "index-total-size": lambda e: e.later(lambda: e.change("model.safetensors.index.json", metadata={"total_size": 7})),
    "scale-orphan": lambda e: e.tensors.update({f"{MLP[0]}.weight_scale": torch.ones(1)}),
    "quantization-not-stored": lambda e: e.config.update(
        quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "mtp*", "model.visual*"]}
    ),
}


@pytest.mark.parametrize("rule", list(BF16_BREAKS))
def test_bf16_broken(rule: str, bf16: Edit) -> None:
    BF16_BREAKS[rule](bf16)
    _, found = checked(bf16)
    assert found.keys() - {"hf-quant-config-missing"} == {rule}


def test_missing_head_names_the_command_that_brings_it_back(bf16: Edit) -> None:
    BF16_BREAKS["mtp-missing"](bf16)
    _, found = checked(bf16)
    assert found["mtp-missing"].remedy == "mtpress graft CKPT OUT --from BASE"
    assert len(found["mtp-missing"].where) == 15


def test_a_text_only_checkpoint(edit: Edit) -> None:
    quantization = edit.quantization
    for name in [n for n in edit.tensors if n.startswith("model.visual.")]:
        del edit.tensors[name]
    for name in [n for n in edit.tensors if n.startswith(PREFIX)]:
        edit.tensors[name.replace("model.language_model.", "model.")] = edit.tensors.pop(name)
    edit.config = edit.text | {"architectures": ["Qwen3_5ForCausalLM"], "quantization_config": quantization}
    edit.ignore([n.replace("model.language_model.", "model.") for n in quantization["ignore"] if "visual" not in n])
    result, found = checked(edit)
    assert found == {}
    assert result.num_quantized == 25


def test_tied_embeddings_need_no_lm_head(bf16: Edit) -> None:
    bf16.config["tie_word_embeddings"] = True
    del bf16.tensors["lm_head.weight"]
    assert checked(bf16)[1] == {}


@pytest.mark.parametrize(
    ("quantization", "title"),
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "AWQ"),
        ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, "modelopt FP8"),
        (
            {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {MLP[0]: {"quant_algo": "MXFP8"}}},
            "modelopt mixed precision",
        ),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"}, "AutoRound"),
        ({"quant_method": "auto-round", "bits": 4, "group_size": 32, "data_type": "mx_fp"}, "AutoRound"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {
                    "g": {"targets": ["Linear"], "weights": INT8 | {"strategy": "channel"}, "input_activations": INT8 | {"dynamic": True}}
                },
            },
            "compressed-tensors",
        ),
    ],
)
def test_formats_that_are_not_covered(quantization: dict[str, Any], title: str, bf16: Edit) -> None:
    pack_int4(bf16, *MLP)
    bf16.config["quantization_config"] = quantization
    result, found = checked(bf16)
    assert set(found) == {"format-not-covered"}
    assert found["format-not-covered"].message.startswith(f"declared: {title}; stored: GPTQ/AutoRound INT4")
    assert (result.format, result.num_quantized, result.sound) == (title, 12, True)


def test_a_packed_draft_head_is_seen_in_any_format(bf16: Edit) -> None:
    pack_int4(bf16, "mtp.fc")
    bf16.config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32}
    _, found = checked(bf16)
    assert set(found) == {"format-not-covered", "mtp-quantized"}
    assert found["mtp-quantized"].where == ("mtp.fc",)


def test_the_config_under_the_name_that_compressed_tensors_once_gave_it(small_formats: dict[str, Path], tmp_path: Path) -> None:
    edit = Edit(Path(shutil.copytree(small_formats["compressed-tensors"], tmp_path / "old")))
    edit.config["compression_config"] = edit.config.pop("quantization_config")
    result, found = checked(edit)
    assert found == {}
    assert result.format == "compressed-tensors NVFP4 (W4A4)"


def test_compressed_tensors_declared_as_modelopt(small_formats: dict[str, Path], small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    edit = Edit(Path(shutil.copytree(small_formats["compressed-tensors"], tmp_path / "other")))
    edit.config["quantization_config"] = json.loads((small_nvfp4["nvfp4-mtp-vlm"] / "config.json").read_text())["quantization_config"]
    _, found = checked(edit)
    assert set(found) == {"format-differs", "hf-quant-config-missing"}
    assert "mtpress convert" in found["format-differs"].remedy


TITLES = {
    "compressed-tensors": "compressed-tensors NVFP4 (W4A4)", "compressed-tensors-w4a16": "compressed-tensors NVFP4 (W4A16)",
    "compressed-tensors-int4": "compressed-tensors INT4 g32", "auto-round": "AutoRound INT4 g32", "gptq": "GPTQ INT4 g32",
    "modelopt-mixed": "modelopt mixed precision (FP8, NVFP4 W4A4)", "fp8": "FP8 in blocks of 32×32",
    "compressed-tensors-mixed": "compressed-tensors NVFP4 (W4A4) and FP8 by row",
}  # fmt: skip


@pytest.mark.parametrize("kind", list(TITLES))
def test_titles(kind: str, small_formats: dict[str, Path]) -> None:
    assert check(small_formats[kind], silent=True).format == TITLES[kind]
