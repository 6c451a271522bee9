"""Scales: one global scale for a fused linear, reciprocals, what is left and what it would cost."""

import random
import shutil
import struct
from pathlib import Path

import pytest
import torch

from checkpoints import PREFIX, Edit
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.formats import nvfp4
from mtpress.repairs.scales import float32, turned_back
from mtpress.stages.check import check
from mtpress.stages.repair import RepairResult, repair

QKV, Z = (f"{PREFIX}layers.0.linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z"))
Q, K, V = (f"{PREFIX}layers.3.self_attn.{name}_proj" for name in "qkv")


@pytest.fixture
def edit(small_nvfp4: dict[str, Path], tmp_path: Path) -> Edit:
    return Edit(Path(shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "broken")))


def repaired(edit: Edit, base: Path | None = None) -> tuple[RepairResult, dict[str, torch.Tensor]]:
    edit.save()
    result = repair(edit.path, edit.path.with_name("out"), base, silent=True)
    made = Checkpoint.open(result.out if result.written else edit.path)
    return result, {name: made.read(name) for name in made.tensors}


def weight(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """float64 weight of an NVFP4 linear: codes, block scales and global scale multiplied without rounding."""
    codes = nvfp4.decode(nvfp4.unpack(tensors[f"{module}.weight"])).double()
    scale = tensors[f"{module}.weight_scale"].double() * tensors[f"{module}.weight_scale_2"].double()
    return codes * scale.repeat_interleave(16, dim=1)


def own_scale(edit: Edit, module: str, ratio: float) -> None:
    """The same codes and block scales under `ratio` times the global scale."""
    edit.tensors[f"{module}.weight_scale_2"] = edit.tensors[f"{module}.weight_scale_2"] * ratio


@pytest.mark.parametrize("ratio", [0.5, 0.25, 2.0])
def test_a_power_of_two_between_shards_costs_nothing(ratio: float, edit: Edit) -> None:
    own_scale(edit, QKV, ratio)
    before = {module: weight(edit.tensors, module) for module in (QKV, Z)}
    codes = {module: edit.tensors[f"{module}.weight"].clone() for module in (QKV, Z)}
    result, made = repaired(edit)
    assert result.sound
    assert made[f"{QKV}.weight_scale_2"] == made[f"{Z}.weight_scale_2"]
    for module in (QKV, Z):
        assert torch.equal(weight(made, module), before[module])
        assert torch.equal(made[f"{module}.weight"], codes[module])


def test_three_shards(edit: Edit) -> None:
    for module, ratio in ((Q, 1.0), (K, 0.5), (V, 0.25)):
        own_scale(edit, module, ratio)
    before = {module: weight(edit.tensors, module) for module in (Q, K, V)}
    result, made = repaired(edit)
    assert result.sound
    assert len({float(made[f"{module}.weight_scale_2"]) for module in (Q, K, V)}) == 1
    assert all(torch.equal(weight(made, module), before[module]) for module in (Q, K, V))


def test_any_other_ratio_is_left_with_what_it_would_cost(edit: Edit) -> None:
    own_scale(edit, QKV, 0.7)
    before = weight(edit.tensors, QKV)
    own, shared = (float(edit.tensors[f"{module}.weight_scale_2"]) for module in (QKV, Z))
    rounded = (edit.tensors[f"{QKV}.weight_scale"].double() * own / shared).to(torch.float8_e4m3fn)
    codes = nvfp4.decode(nvfp4.unpack(edit.tensors[f"{QKV}.weight"])).double()
    naive = codes * (rounded.double() * shared).repeat_interleave(16, dim=1)
    cost = float((naive - before).norm() / before.norm())
    result, _ = repaired(edit)
    assert (result.sound, result.written) == (False, False)
    (outcome,) = result.left
    assert outcome.finding.id == "fused-scales-differ"
    said = float(outcome.left[0].why.split(" by ")[1].split(" ")[0])
    assert 0 < said <= cost * 1.01  # a shared scale is searched; the largest of the group is one choice of many
    assert said > 0.005


def test_a_wrong_global_scale_is_told_from_an_unshared_one(edit: Edit, small_bf16: Path, small_nvfp4: dict[str, Path]) -> None:
    own_scale(edit, QKV, 0.7)
    result, made = repaired(edit, small_bf16)
    sound = Checkpoint.open(small_nvfp4["nvfp4-mtp-vlm"])
    assert result.sound
    assert "the scale itself was wrong" in result.fixed[0].fixed[0].how
    for suffix in ("weight", "weight_scale", "weight_scale_2"):
        assert torch.equal(made[f"{QKV}.{suffix}"].view(-1).view(torch.uint8), sound.read(f"{QKV}.{suffix}").view(-1).view(torch.uint8))


def test_a_dry_run_does_not_promise(edit: Edit) -> None:
    own_scale(edit, QKV, 0.7)
    edit.save()
    result = repair(edit.path, edit.path.with_name("out"), dry_run=True)
    assert "if E4M3 allows it" in result.fixed[0].fixed[0].how
    assert not edit.path.with_name("out").exists()


def test_a_reciprocal_is_turned_back_to_the_bit() -> None:
    """Of every scale that an amax in BF16 gives: 1/x in float32 has several x, the amax has 8 significant bits."""
    rng = random.Random(5)
    for _ in range(2000):
        amax = struct.unpack("<f", struct.pack("<I", rng.randrange(0x3A00, 0x4100) << 16))[0]
        scale = float32(amax / 2688)
        assert turned_back(float32(1 / scale)) == scale


def test_a_reciprocal_of_no_bf16_amax_is_within_an_ulp() -> None:
    rng = random.Random(7)
    for _ in range(2000):
        scale = float32(rng.uniform(1e-6, 1e-2))
        assert abs(turned_back(float32(1 / scale)) - scale) <= scale * 2.0**-23
        assert turned_back(float32(1 / scale), scale) == scale


def test_all_scales_as_reciprocals(edit: Edit, small_nvfp4: dict[str, Path]) -> None:
    """compressed-tensors' convention in modelopt's tensors: input_scale is one too, where no rule can see it."""
    for name in [n for n in edit.tensors if n.endswith(("weight_scale_2", "input_scale"))]:
        edit.tensors[name] = 1 / edit.tensors[name]
    result, made = repaired(edit)
    assert result.sound
    sound = Checkpoint.open(small_nvfp4["nvfp4-mtp-vlm"])
    assert all(torch.equal(made[name], sound.read(name)) for name in made if name.endswith("weight_scale_2"))
    assert all(abs(made[name] - 0.01) < 1e-9 for name in made if name.endswith("input_scale"))


def test_an_input_scale_is_taken_from_its_group(edit: Edit, small_nvfp4: dict[str, Path]) -> None:
    del edit.tensors[f"{K}.input_scale"]
    result, made = repaired(edit)
    assert result.sound
    assert torch.equal(made[f"{K}.input_scale"], Checkpoint.open(small_nvfp4["nvfp4-mtp-vlm"]).read(f"{K}.input_scale"))


def test_without_any_input_scale_activations_stay_in_16_bits(edit: Edit) -> None:
    for name in [n for n in edit.tensors if n.endswith(".input_scale")]:
        del edit.tensors[name]
    result, _ = repaired(edit)
    assert result.sound
    assert check(result.out, silent=True).format == "modelopt NVFP4 (W4A16)"


def test_kv_scales_of_another_dtype_are_cast(edit: Edit) -> None:
    edit.tensors[f"{K}.k_scale"] = torch.tensor(0.5, dtype=torch.bfloat16)
    result, made = repaired(edit)
    assert result.sound
    assert made[f"{K}.k_scale"].dtype == torch.float32
    assert made[f"{K}.k_scale"] == 0.5


def test_block_scales_that_are_no_e4m3_numbers_are_left(edit: Edit) -> None:
    name = f"{QKV}.weight_scale"
    edit.tensors[name] = edit.tensors[name].to(torch.bfloat16) * 1.03125
    result, _ = repaired(edit)
    assert not result.sound
    assert result.left[0].finding.id == "weight-dtype"
