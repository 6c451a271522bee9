"""What the first table of docs/second-hand.md says of each library's export, seen in the files; each is made once."""

import json
from pathlib import Path

import pytest
import torch

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import INDEX_NAME, Checkpoint
from mtpress.formats import int4
from mtpress.models.qwen3_5.names import MTP_TENSORS
from real_exports import EXPORTS, real_export

pytestmark = pytest.mark.oracle
SOURCE = Checkpoint.open(BUILTIN_MODEL)


def read(path: Path, name: str) -> dict:
    return json.loads((path / name).read_text(encoding="utf-8"))


def differing(made: Checkpoint) -> list[str]:
    """Tensors under the source's own names that are not its values: auto-round writes F32 where the CPU computes no BF16."""
    shared = [name for name in made.tensors if name in SOURCE.tensors and made.tensors[name].dtype in (SOURCE.tensors[name].dtype, "F32")]
    assert len(shared) > 50
    return [name for name in shared if not torch.equal(made.read(name).float(), SOURCE.read(name).float())]


@pytest.mark.parametrize("name", EXPORTS)
def test_it_is_made_once(name: str) -> None:
    first = real_export(name)
    made = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    assert real_export(name) == first
    assert {file.name: file.stat().st_mtime_ns for file in first.iterdir()} == made


def test_modelopt_drops_the_head_and_promises_it() -> None:
    made = real_export("modelopt")
    assert not set(MTP_TENSORS) & set(Checkpoint.open(made).tensors)
    assert read(made, "config.json")["text_config"]["mtp_num_hidden_layers"] == 1
    assert not [entry for entry in read(made, "config.json")["quantization_config"]["ignore"] if "mtp" in entry]
    assert differing(Checkpoint.open(made)) == []


def test_autoround_rounds_the_layer_of_the_head_but_not_fc() -> None:
    made = real_export("autoround")
    checkpoint = Checkpoint.open(made)
    packed = {name.removesuffix(f".{int4.QWEIGHT}") for name in checkpoint.tensors if name.endswith(int4.QWEIGHT)}
    assert len([module for module in packed if module.startswith("mtp.layers.0.")]) == 7
    assert "mtp.fc.weight" in checkpoint.tensors and "mtp.fc" not in packed
    assert differing(checkpoint) == []
    ours, theirs = read(made, "config.json")["quantization_config"], read(made, "quantization_config.json")
    assert "mtp.layers" in ours["block_name_to_quantize"] and "mtp" not in str(theirs["block_name_to_quantize"])
    assert "mtp.fc" in ours["extra_config"] and "mtp.fc" not in theirs["extra_config"]
    assert read(made, INDEX_NAME)["metadata"]["total_size"] == 0
    assert read(made, "tokenizer_config.json")["tokenizer_class"] == "Qwen3_5Tokenizer"


def test_about_half_of_autoround_s_scales_are_negative() -> None:
    checkpoint = Checkpoint.open(real_export("autoround"))
    scales = torch.cat([checkpoint.read(name).flatten() for name in checkpoint.tensors if name.endswith(f".{int4.SCALES}")])
    assert len(scales) == 25_600
    assert 0.45 < float((scales < 0).float().mean()) < 0.55


@pytest.mark.parametrize("name", ["llmcompressor", "llmcompressor-gdn"])
def test_llm_compressor_keeps_the_head_and_loses_bits_of_norms(name: str) -> None:
    made = real_export(name)
    moved = differing(Checkpoint.open(made))
    assert len(moved) == 11 and all(tensor.endswith("norm.weight") for tensor in moved)
    assert not [tensor for tensor in moved if tensor.startswith("mtp.")]
    assert "re:^mtp.*" in read(made, "config.json")["quantization_config"]["ignore"]
    sizes = sum(info.num_bytes for info in Checkpoint.open(made).tensors.values())
    assert read(made, INDEX_NAME)["metadata"]["total_size"] != sizes


def test_llm_compressor_gives_in_proj_qkv_and_z_scales_of_their_own() -> None:
    checkpoint = Checkpoint.open(real_export("llmcompressor-gdn"))
    gdn = "model.language_model.layers.0.linear_attn.in_proj_"
    qkv, z = (float(checkpoint.read(f"{gdn}{part}.weight_global_scale")) for part in ("qkv", "z"))
    assert qkv != z
    gate, up = (float(checkpoint.read(f"model.language_model.layers.0.mlp.{part}_proj.weight_global_scale")) for part in ("gate", "up"))
    assert gate == up
