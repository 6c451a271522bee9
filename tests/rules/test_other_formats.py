"""BF16, text-only, compressed-tensors and AutoRound checkpoints: recognised, and checked as far as the rules go."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import PREFIX, Edit
from mtpress.rules.rule import Finding
from mtpress.stages.check import CheckResult, check

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


def as_compressed_tensors(edit: Edit) -> None:
    """The same numbers in compressed-tensors' layout."""
    for name in [n for n in edit.tensors if n.endswith(".weight_scale_2")]:
        module = name.removesuffix(".weight_scale_2")
        edit.tensors[f"{module}.weight_packed"] = edit.tensors.pop(f"{module}.weight")
        edit.tensors[f"{module}.weight_global_scale"] = 1 / edit.tensors.pop(name).reshape(1)
        edit.tensors[f"{module}.input_global_scale"] = 1 / edit.tensors.pop(f"{module}.input_scale").reshape(1)
    edit.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head", "re:.*mtp.*"],
    }  # fmt: skip
    edit.hf = None
    (edit.path / "hf_quant_config.json").unlink()


def packed(n: int, k: int, group_size: int = 32) -> dict[str, torch.Tensor]:
    return {
        "qweight": torch.zeros(k // 8, n, dtype=torch.int32),
        "qzeros": torch.zeros(k // group_size, n // 8, dtype=torch.int32),
        "scales": torch.ones(k // group_size, n, dtype=torch.float16),
    }


def as_auto_round(edit: Edit, *modules: str) -> None:
    """AutoRound's layout for some modules, BF16 for the rest."""
    for module in modules:
        n, k = edit.tensors.pop(f"{module}.weight").shape
        edit.tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed(n, k).items()}
    edit.config["quantization_config"] = {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "sym": True,
    }  # fmt: skip


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


def test_compressed_tensors_is_recognised(edit: Edit) -> None:
    as_compressed_tensors(edit)
    result, found = checked(edit)
    assert set(found) == {"format-not-covered"}
    assert "stored: compressed-tensors NVFP4" in found["format-not-covered"].message
    assert (result.format, result.num_quantized, result.sound) == ("compressed-tensors", 25, True)


def test_compressed_tensors_declared_as_modelopt(edit: Edit) -> None:
    declared = json.loads(json.dumps(edit.quantization))
    as_compressed_tensors(edit)
    edit.config["quantization_config"] = declared
    _, found = checked(edit)
    assert "format-differs" in found
    assert "mtpress convert" in found["format-differs"].remedy


def test_auto_round_is_recognised(bf16: Edit) -> None:
    as_auto_round(bf16, *MLP)
    result, found = checked(bf16)
    assert set(found) == {"format-not-covered"}
    assert "stored: GPTQ/AutoRound INT4" in found["format-not-covered"].message
    assert (result.format, result.num_quantized) == ("AutoRound", 12)


def test_auto_round_with_a_packed_draft_head(bf16: Edit) -> None:
    as_auto_round(bf16, *MLP, "mtp.fc")
    _, found = checked(bf16)
    assert set(found) == {"format-not-covered", "mtp-quantized"}
    assert found["mtp-quantized"].where == ("mtp.fc",)
