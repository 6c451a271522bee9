"""Draft heads in FP8: taken as they are where the config can hold them, in BF16 by their own codes where it cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import FP8_BLOCK, Edit, in_fp8
from format_breaks import MTP_LAYER, the_draft_layer_in_fp8_as_qwen_releases_it
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.formats import fp8
from mtpress.models.qwen3_5.names import MTP_TENSORS
from mtpress.stages.check import check
from mtpress.stages.graft import graft


@pytest.fixture
def release(small_formats: dict[str, Path], tmp_path: Path) -> Path:
    """A block-FP8 build with its draft layer in FP8 too."""
    edit = Edit(Path(shutil.copytree(small_formats["fp8"], tmp_path / "release")))
    the_draft_layer_in_fp8_as_qwen_releases_it(edit)
    edit.save()
    return edit.path


def headless(path: Path, out: Path) -> Path:
    edit = Edit(Path(shutil.copytree(path, out)))
    for name in [name for name in edit.tensors if name.startswith("mtp.")]:
        del edit.tensors[name]
    edit.save()
    return out


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_bf16_head_into_an_fp8_build(release: Path, small_bf16: Path, tmp_path: Path) -> None:
    result = graft(release, tmp_path / "out", small_bf16, silent=True)
    assert result.dequantized == () and check(result.out, silent=True).findings == ()
    spared = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert set(MTP_LAYER) <= set(spared)
    made, base = tensors(tmp_path / "out"), Checkpoint.open(small_bf16)
    assert all(torch.equal(made[name], base.read(name)) for name in MTP_TENSORS)
    assert not [name for name in made if name.startswith("mtp.") and name not in MTP_TENSORS]


def test_an_fp8_head_goes_over_as_it_is_where_the_config_can_hold_it(release: Path, small_formats: dict[str, Path], tmp_path: Path) -> None:
    result = graft(headless(small_formats["fp8"], tmp_path / "headless"), tmp_path / "out", release, silent=True)
    assert result.dequantized == () and result.warnings == ()
    assert [finding.id for finding in check(result.out, silent=True).findings] == ["mtp-fp8"]
    made, given = tensors(tmp_path / "out"), tensors(release)
    head = {name for name in given if name.startswith("mtp.")}
    assert {name for name in made if name.startswith("mtp.")} == head and len(head) == 22
    assert all(torch.equal(made[name].view(torch.uint8), given[name].view(torch.uint8)) for name in head)


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors-mixed", "gptq", "bf16"])
def test_an_fp8_head_is_dequantized_where_the_config_cannot(
    kind: str, release: Path, small_formats: dict[str, Path], small_nvfp4: dict[str, Path], small_bf16: Path, tmp_path: Path
) -> None:
    paths = {"modelopt": small_nvfp4["nvfp4-mtp-vlm"], "bf16": small_bf16, **small_formats}
    result = graft(headless(paths[kind], tmp_path / "headless"), tmp_path / "out", release, silent=True)
    assert set(result.dequantized) == set(MTP_LAYER) and "are dequantized to BF16" in result.warnings[0]
    assert check(result.out, silent=True).findings == ()
    made, given = tensors(tmp_path / "out"), tensors(release)
    for module in MTP_LAYER:
        expected, _ = fp8.to_bf16(given[f"{module}.weight"], given[f"{module}.weight_scale_inv"], (FP8_BLOCK, FP8_BLOCK))
        assert torch.equal(made[f"{module}.weight"], expected)
    record = json.loads((tmp_path / "out/mtpress.json").read_text())
    assert "the base's, dequantized from FP8 to BF16" in json.dumps(record)


def test_a_head_in_fp8_without_its_scales_is_refused(release: Path, small_bf16: Path, tmp_path: Path) -> None:
    edit = Edit(release)
    del edit.tensors[f"{MTP_LAYER[0]}.weight_scale_inv"]
    edit.save()
    with pytest.raises(InputError, match="is F8_E4M3, not BF16 or whole FP8"):
        graft(small_bf16, tmp_path / "out", release, silent=True)
    assert not (tmp_path / "out").exists()


def test_a_head_with_a_scale_a_row(small_bf16: Path, small_formats: dict[str, Path], tmp_path: Path) -> None:
    """Into a config whose groups name what they quantize: nothing there names the head, so it is dequantized."""
    giver = Edit(Path(shutil.copytree(small_formats["compressed-tensors-mixed"], tmp_path / "giver")))
    in_fp8(giver, *MTP_LAYER)
    giver.quantization["ignore"] = [name for name in giver.quantization["ignore"] if name not in MTP_LAYER]
    giver.quantization["config_groups"]["group_1"]["targets"] += MTP_LAYER
    giver.save()
    target = headless(small_formats["compressed-tensors-mixed"], tmp_path / "headless")
    result = graft(target, tmp_path / "out", giver.path, silent=True)
    assert set(result.dequantized) == set(MTP_LAYER)
    assert check(result.out, silent=True).findings == ()
