"""Bases that are no plain BF16 checkpoint: quantized ones, for what they hold in 16 bits, and those under other names."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import PREFIX, Edit
from format_breaks import MTP_LAYER, the_draft_layer_in_fp8_as_qwen_releases_it
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.models.qwen3_5.names import MTP_TENSORS
from mtpress.quant_config.view import Subject
from mtpress.stages.repair import RepairResult, repair
from trainer_layouts import DRAFT, TOWER, Layout, named

VLM = "nvfp4-mtp-vlm"
NORM, TOWERS = f"{PREFIX}layers.1.input_layernorm.weight", "model.visual.pos_embed.weight"
OUT_PROJ, Q = f"{PREFIX}layers.0.linear_attn.out_proj", f"{PREFIX}layers.3.self_attn.q_proj"


@pytest.fixture
def edit(small_nvfp4: dict[str, Path], tmp_path: Path) -> Edit:
    return Edit(Path(shutil.copytree(small_nvfp4[VLM], tmp_path / "broken")))


def lose_what_every_base_has(edit: Edit) -> list[str]:
    """The draft head, a norm and the tower."""
    lost = [name for name in edit.tensors if name.startswith(("mtp.", "model.visual.")) or name == NORM]
    for name in lost:
        del edit.tensors[name]
    return lost


def repaired(edit: Edit, base: Path) -> tuple[RepairResult, dict[str, torch.Tensor]]:
    edit.save()
    result = repair(edit.path, edit.path.with_name("out"), base, silent=True)
    made = Checkpoint.open(result.out if result.written else edit.path)
    return result, {name: made.read(name) for name in made.tensors}


@pytest.mark.parametrize("kind", ["fp8", "gptq", "compressed-tensors", "compressed-tensors-int4", "modelopt-mixed"])
def test_what_a_quantized_base_has_in_16_bits_is_put_from_it(kind: str, edit: Edit, small_formats: dict[str, Path]) -> None:
    lost, theirs = lose_what_every_base_has(edit), load_file(small_formats[kind] / "model.safetensors")
    result, made = repaired(edit, small_formats[kind])
    assert result.sound and not result.left, result.outcomes
    assert result.relation is not None and result.relation.kind == "source"
    assert {*MTP_TENSORS, NORM, TOWERS} <= set(lost)
    assert all(torch.equal(made[name], theirs[name]) for name in lost)


def test_what_the_base_holds_quantized_is_named_and_left(edit: Edit, small_formats: dict[str, Path]) -> None:
    lost = lose_what_every_base_has(edit)
    for module in (OUT_PROJ, Q):
        del edit.tensors[f"{module}.weight_scale"]
    result, made = repaired(edit, small_formats["fp8"])
    assert not result.sound and result.written and all(name in made for name in lost)
    (left,) = {left for outcome in result.left if outcome.finding.severity == "error" for left in outcome.left}
    assert left.why == f"the base holds {OUT_PROJ}.weight as FP8, and only numbers in 16 bits are put from it"
    assert "a --base that has it in 16 bits" in left.takes


def test_codes_of_the_base_never_take_the_place_of_numbers(edit: Edit, small_bf16: Path, small_formats: dict[str, Path]) -> None:
    """A BF16 matrix with a NaN, and FP8 codes of the same name and shape in the base."""
    module = OUT_PROJ
    for suffix in ("weight_scale", "weight_scale_2", "input_scale"):
        del edit.tensors[f"{module}.{suffix}"]
    edit.tensors[f"{module}.weight"] = load_file(small_bf16 / "model.safetensors")[f"{module}.weight"]
    edit.tensors[f"{module}.weight"][3, 5] = torch.nan
    edit.ignore([*edit.quantization["ignore"], module])
    result, made = repaired(edit, small_formats["fp8"])
    assert any(f"the base holds {module}.weight as FP8" in left.why for outcome in result.left for left in outcome.left)
    assert bool(made[f"{module}.weight"][3, 5].isnan()) and not result.sound


@pytest.mark.parametrize("gone", ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"])
def test_a_head_that_is_fp8_in_the_base(gone: str, edit: Edit, small_formats: dict[str, Path], tmp_path: Path) -> None:
    """As in Qwen's own FP8 releases: fc and the norms are in BF16."""
    base = Edit(Path(shutil.copytree(small_formats["fp8"], tmp_path / "base")))
    the_draft_layer_in_fp8_as_qwen_releases_it(base)
    base.save()
    del edit.tensors[gone]
    result, made = repaired(edit, base.path)
    assert result.sound == (gone == "mtp.fc.weight")
    if result.sound:
        assert torch.equal(made[gone], base.tensors[gone])
    else:
        assert gone.removesuffix(".weight") in MTP_LAYER
        assert f"the base holds {gone} as FP8" in next(left.why for outcome in result.left for left in outcome.left)


def test_the_config_of_a_quantized_base_says_nothing_of_its_quantization(edit: Edit, small_formats: dict[str, Path]) -> None:
    edit.later(lambda: (edit.path / "config.json").write_text("{"))
    result, _ = repaired(edit, small_formats["fp8"])
    assert result.sound, result.findings
    declared = Subject(Checkpoint.open(result.out)).declared
    assert declared is not None and (declared.method, declared.ignore) == ("modelopt", tuple(edit.quantization["ignore"]))


NAMES: dict[str, Layout] = {
    "of a trainer": named((r"^", "module.")),
    "of the engine": named((r"^model\.language_model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head"),
                           (TOWER, "visual.")),
    "doubled and compiled": named((r"^model\.language_model\.", "_orig_mod.model.language_model.language_model.")),
    "with a head in DeepSeek's words": named((DRAFT + r"layers\.0\.", "model.layers.4."), (DRAFT + "fc", "model.layers.4.eh_proj"),
                                              (DRAFT + "norm", "model.layers.4.shared_head.norm"),
                                              (DRAFT + "pre_fc_norm_embedding", "model.layers.4.enorm"),
                                              (DRAFT + "pre_fc_norm_hidden", "model.layers.4.hnorm")),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_a_base_under_other_names_is_read_by_its_meaning(kind: str, edit: Edit, small_bf16: Path, tmp_path: Path) -> None:
    base, theirs = Path(shutil.copytree(small_bf16, tmp_path / "base")), load_file(small_bf16 / "model.safetensors")
    save_file(NAMES[kind](theirs), base / "model.safetensors", metadata={"format": "pt"})
    lost = lose_what_every_base_has(edit)
    for module in (OUT_PROJ, Q):
        del edit.tensors[f"{module}.weight_scale"]
    result, made = repaired(edit, base)
    assert result.sound, result.findings
    assert result.relation is not None and result.relation.kind == "source"
    assert all(torch.equal(made[name], theirs[name]) for name in (*lost, f"{OUT_PROJ}.weight", f"{Q}.weight"))
