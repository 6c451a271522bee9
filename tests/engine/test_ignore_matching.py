"""What vLLM makes of every recipe's ignore list, linear by linear, under the names that vLLM gives them.

The checkpoint has the module names of Qwen3.6-27B (64 layers, a vision tower of 27 blocks) and small matrices.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import weight_only
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.plan.recipe import Recipe, load_recipe, shipped
from mtpress.stages.quantize import quantize

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_BLOCKS = 64, 27
FULL_ATTENTION = [i for i in range(NUM_LAYERS) if i % 4 == 3]
SMALL = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 1280, "num_hidden_layers": NUM_LAYERS}
RECIPES = {name: recipe for name in shipped() if (recipe := load_recipe(name)).format == "nvfp4"}
SCRIPT = Path(__file__).with_name("build_on_meta.py")

QUANTIZED, KEPT = "ModelOptLinearMethod", "UnquantizedLinearMethod"
NO_SHARD = "some_of_ba"  # lists only one half of in_proj_ba
NO_DRAFT = "no_mtp"  # lists nothing of the draft head


def large_names(source: Path, out: Path) -> Path:
    """A BF16 checkpoint in the layout of `source`, with as many layers and blocks as Qwen3.6-27B."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    config = json.loads((out / "config.json").read_text())
    config["text_config"] |= SMALL | {"layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(NUM_LAYERS)]}
    config["vision_config"] |= {"depth": NUM_BLOCKS, "out_hidden_size": SMALL["hidden_size"]}
    (out / "config.json").write_text(json.dumps(config))
    shapes = dict(qwen3_5.body_shapes(config, "model.language_model.")) | qwen3_5.mtp_shapes(config) | qwen3_5.vision_shapes(config)
    tensors = {name: torch.full(shape, 0.02, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def without(build: Path, out: Path, dropped: Any) -> Path:
    """The config files of a build whose ignore list lacks what `dropped` says."""
    shutil.copytree(build, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "hf_quant_config.json"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"] = [n for n in config["quantization_config"]["ignore"] if not dropped(n)]
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.fixture(scope="module")
def folder(bf16_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory a shipped recipe, and the two controls."""
    folder = tmp_path_factory.mktemp("names")
    source = large_names(bf16_model, folder / "source")
    for name in RECIPES:
        quantize(source, folder / name, weight_only(name), silent=True)  # only names count here
    without(folder / "nvfp4-mtp-vlm", folder / NO_SHARD, lambda n: n.endswith("in_proj_a"))
    without(folder / "nvfp4-mtp-vlm", folder / NO_DRAFT, lambda n: n.startswith("mtp."))
    return folder


@pytest.fixture(scope="module")
def decisions(folder: Path, engine_python: Path) -> dict[str, Any]:
    """Directory name → what vLLM decided."""
    text_only = [name for name, recipe in RECIPES.items() if recipe.vision == "drop"]
    names = [*(n for n in RECIPES if n not in text_only), NO_SHARD, NO_DRAFT, "--language-model-only", *text_only]
    paths = [n if n.startswith("--") else str(folder / n) for n in names]
    command = [str(engine_python), str(SCRIPT), str(folder / "found.json"), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((folder / "found.json").read_text())
    for built in found:
        for side in ("target", "draft"):
            built[side] = {prefix: method for prefix, (_, method) in built.get(side, {}).items()}
    return dict(zip([n for n in names if not n.startswith("--")], found, strict=True))


def expected_target(recipe: Recipe) -> dict[str, str]:
    """Every linear of the target by its vLLM name, and whether it is quantized, written out."""
    mlp, attention, gdn = (QUANTIZED if part in recipe.quantize else KEPT for part in ("mlp", "attention", "gdn"))
    ba = QUANTIZED if recipe.in_proj_ab == "nvfp4" else KEPT
    found = {"language_model.lm_head": KEPT, "language_model.model.embed_tokens": "UnquantizedEmbeddingMethod"}
    for i in range(NUM_LAYERS):
        layer = f"language_model.model.layers.{i}"
        found |= {f"{layer}.mlp.gate_up_proj": mlp, f"{layer}.mlp.down_proj": mlp}
        if i in FULL_ATTENTION:
            found |= {f"{layer}.self_attn.qkv_proj": attention, f"{layer}.self_attn.o_proj": attention}
        else:
            found |= {f"{layer}.linear_attn.in_proj_qkvz": gdn, f"{layer}.linear_attn.out_proj": gdn}
            found |= {f"{layer}.linear_attn.in_proj_ba": ba, f"{layer}.linear_attn.conv1d": KEPT}
    if recipe.vision == "keep":
        found |= {"visual.merger.linear_fc1": KEPT, "visual.merger.linear_fc2": KEPT}
        for i in range(NUM_BLOCKS):
            found |= {f"visual.blocks.{i}.{name}": KEPT for name in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")}
    return found


EXPECTED_DRAFT = {
    "mtp.fc": KEPT, "mtp.layers.0.self_attn.qkv_proj": KEPT, "mtp.layers.0.self_attn.o_proj": KEPT,
    "mtp.layers.0.mlp.gate_up_proj": KEPT, "mtp.layers.0.mlp.down_proj": KEPT,
    "lm_head": KEPT, "model.embed_tokens": "UnquantizedEmbeddingMethod",
}  # fmt: skip


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_vllm_quantizes_what_the_plan_says(recipe: str, decisions: dict[str, Any]) -> None:
    assert decisions[recipe]["target"] == expected_target(RECIPES[recipe])
    assert decisions[recipe]["draft"] == EXPECTED_DRAFT


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_ignored_name_survives_the_name_map(recipe: str, folder: Path, decisions: dict[str, Any]) -> None:
    config = json.loads((folder / recipe / "config.json").read_text())
    ignore = config["quantization_config"]["ignore"]
    renamed = [n.replace("model.language_model.", "language_model.model.").replace("model.visual.", "visual.") for n in ignore]
    assert decisions[recipe]["exclude"] == renamed
    legacy = json.loads((folder / recipe / "hf_quant_config.json").read_text())
    assert legacy["quantization"]["exclude_modules"] == ignore


def test_control_a_fused_pair_must_be_listed_whole(decisions: dict[str, Any]) -> None:
    assert "some but not all shards of language_model.model.layers.0.linear_attn.in_proj_ba" in decisions[NO_SHARD]["error"]


def test_control_an_unlisted_draft_head_is_taken_as_quantized(decisions: dict[str, Any]) -> None:
    # vLLM 0.32 itself keeps mtp.fc of modelopt checkpoints in BF16; older builds do not
    layer = {name: QUANTIZED for name in EXPECTED_DRAFT if name.startswith("mtp.layers.0.")}
    assert decisions[NO_DRAFT]["draft"] == EXPECTED_DRAFT | layer
