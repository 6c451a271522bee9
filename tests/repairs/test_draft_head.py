"""The draft head: INT4 back to BF16 as the seed card does it, names, what is taken from the base, what is dropped."""

import shutil
from pathlib import Path

import pytest
import torch

from checkpoints import Edit
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.formats import int4
from mtpress.models.qwen3_5.names import MTP_TENSORS
from mtpress.stages.repair import RepairResult, repair

VLM = "nvfp4-mtp-vlm"


@pytest.fixture
def edit(small_nvfp4: dict[str, Path], tmp_path: Path) -> Edit:
    return Edit(Path(shutil.copytree(small_nvfp4[VLM], tmp_path / "broken")))


def repaired(edit: Edit, base: Path | None = None) -> tuple[RepairResult, dict[str, torch.Tensor]]:
    edit.save()
    result = repair(edit.path, edit.path.with_name("out"), base, silent=True)
    made = Checkpoint.open(result.out)
    return result, {name: made.read(name) for name in made.tensors}


def pack(edit: Edit, module: str, group_size: int, stored_zero: int, seed: int = 0) -> torch.Tensor:
    """Random INT4 in place of a BF16 matrix, in GPTQ's layout; the BF16 [N, K] that it stands for, by the card's own formula."""
    n, k = edit.tensors.pop(f"{module}.weight").shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (k, n), generator=generator)
    scales = (0.001 + 0.01 * torch.rand(k // group_size, n, generator=generator)).half()
    words = sum(codes.view(k // 8, 8, n)[:, i].long() << (4 * i) for i in range(8))
    zeros = sum(torch.full((k // group_size, n // 8), stored_zero).long() << (4 * i) for i in range(8))
    edit.tensors |= {
        f"{module}.qweight": (words - (words >> 31 << 32)).int(),  # type: ignore[operator]
        f"{module}.qzeros": (zeros - (zeros >> 31 << 32)).int(),  # type: ignore[operator]
        f"{module}.scales": scales,
    }
    grouped = codes.view(k // group_size, group_size, n).float() - 8.0
    return (grouped * scales.float().unsqueeze(1)).view(k, n).t().contiguous().to(torch.bfloat16)


@pytest.mark.parametrize("stored_zero", [int4.STORED_LESS_ONE, int4.STORED_AS_IS])
@pytest.mark.parametrize("modules", [["mtp.fc"], ["mtp.layers.0.self_attn.q_proj", "mtp.layers.0.self_attn.k_proj", "mtp.fc"]])
def test_int4_is_dequantized_exactly(modules: list[str], stored_zero: int, edit: Edit) -> None:
    expected = {module: pack(edit, module, 32, stored_zero, seed) for seed, module in enumerate(modules)}
    result, made = repaired(edit)
    assert result.sound, result.findings
    assert {outcome.finding.id for outcome in result.fixed} >= {"mtp-quantized"}
    for module, weight in expected.items():
        assert torch.equal(made[f"{module}.weight"].view(torch.int16), weight.view(torch.int16))
    assert {name for name in made if name.startswith("mtp.")} == set(MTP_TENSORS)


def test_with_a_base_the_head_is_the_bases(edit: Edit, small_bf16: Path) -> None:
    pack(edit, "mtp.fc", 32, 7)
    result, made = repaired(edit, small_bf16)
    base = Checkpoint.open(small_bf16)
    assert result.sound
    assert all(torch.equal(made[name].view(torch.int16), base.read(name).view(torch.int16)) for name in MTP_TENSORS)
    assert {name for name in made if name.startswith("mtp.")} == set(MTP_TENSORS)


def test_a_packed_head_under_a_wrong_prefix(edit: Edit) -> None:
    expected = pack(edit, "mtp.fc", 32, 7)
    for name in [n for n in edit.tensors if n.startswith("mtp.")]:
        edit.tensors[f"model.{name}"] = edit.tensors.pop(name)
    result, made = repaired(edit)
    assert result.sound, result.findings
    assert torch.equal(made["mtp.fc.weight"].view(torch.int16), expected.view(torch.int16))


def test_a_head_that_stands_twice_is_taken_once(edit: Edit, small_bf16: Path) -> None:
    for name in MTP_TENSORS:
        edit.tensors[f"model.{name}"] = edit.tensors[name].clone()
    result, made = repaired(edit)
    base = Checkpoint.open(small_bf16)
    assert result.sound
    assert all(torch.equal(made[name].view(torch.int16), base.read(name).view(torch.int16)) for name in MTP_TENSORS)
    assert not [name for name in made if name.startswith("model.mtp")]


def test_of_two_heads_that_differ_none_is_dropped(edit: Edit, small_bf16: Path) -> None:
    edit.tensors["model.mtp.fc.weight"] = edit.tensors["mtp.fc.weight"] + 1
    edit.tensors["model.mtp.norm.weight"] = edit.tensors["mtp.norm.weight"].clone()
    kept = edit.tensors["model.mtp.fc.weight"].clone()
    result, made = repaired(edit, small_bf16)
    assert not result.sound
    assert "mtp-misplaced" in {outcome.finding.id for outcome in result.left}
    assert torch.equal(made["model.mtp.fc.weight"], kept)
    assert "model.mtp.norm.weight" not in made


def test_a_base_whose_head_does_not_fit(edit: Edit, small_bf16: Path, tmp_path: Path) -> None:
    for name in [n for n in edit.tensors if n.startswith("mtp.")]:
        del edit.tensors[name]
    edit.save()
    other = Edit(Path(shutil.copytree(small_bf16, tmp_path / "other")))
    other.tensors["mtp.fc.weight"] = torch.zeros(32, 128, dtype=torch.bfloat16)
    other.save()
    result = repair(edit.path, tmp_path / "out", other.path, silent=True)
    assert not result.sound
    (left,) = (outcome for outcome in result.left if outcome.finding.id == "mtp-missing")
    assert "mtp.fc.weight is missing or of another shape" in left.left[0].why


def test_a_trained_head_is_not_undone_without_asking(edit: Edit, small_bf16: Path) -> None:
    """With the base it is told; only where the user says that the base is the source does it become the base's again."""
    edit.tensors["mtp.fc.weight"] = edit.tensors["mtp.fc.weight"] + 1
    edit.save()
    assert repair(edit.path, edit.path.with_name("a"), silent=True).outcomes == ()
    assert repair(edit.path, edit.path.with_name("b"), small_bf16, comparing=False, silent=True).outcomes == ()
    told = repair(edit.path, edit.path.with_name("c"), small_bf16, silent=True)
    assert [outcome.finding.id for outcome in told.left] == ["mtp-differs"]
    assert not told.written
    assert not told.sound
    assert repair(edit.path, edit.path.with_name("d"), small_bf16, base_is="ancestor", silent=True).sound
    result = repair(edit.path, edit.path.with_name("e"), small_bf16, base_is="source", silent=True)
    assert [outcome.finding.id for outcome in result.fixed] == ["mtp-differs"]
    assert result.sound
