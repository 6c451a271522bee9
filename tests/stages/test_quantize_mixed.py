"""quantize with a format for each component, end to end on the built-in model: every byte of the output is accounted for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtpress.builtin import BUILTIN_MODEL
from mtpress.cli import main
from mtpress.formats import fp8, nvfp4
from mtpress.models.qwen3_5.names import FUSED
from mtpress.plan.recipe import CalibrationSource, Recipe, load_recipe
from mtpress.stages.quantize import quantize

SMALL = CalibrationSource(num_samples=3, max_seq_len=64)
MIXED = ["nvfp4-fp8-vlm", "w4a16-fp8-vlm"]


def small(name: str) -> Recipe:
    return load_recipe(name).model_copy(update={"calibration": SMALL})


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both mixed recipes, and plain NVFP4 of the same samples."""
    folder = tmp_path_factory.mktemp("built")
    for name in (*MIXED, "nvfp4-mtp-vlm"):
        quantize(BUILTIN_MODEL, folder / name, small(name), calibration=["builtin"], silent=True)
    return {name: folder / name for name in (*MIXED, "nvfp4-mtp-vlm")}


@pytest.mark.parametrize("recipe", MIXED)
def test_every_tensor_is_kept_or_in_the_format_of_its_component(recipe: str, built: dict[str, Path]) -> None:
    made, source, plain = weights(built[recipe]), weights(BUILTIN_MODEL), weights(built["nvfp4-mtp-vlm"])
    counted = {"fp8": 0, "nvfp4": 0}
    for name, tensor in source.items():
        module = name.removesuffix(".weight")
        stored = made.pop(name)
        if f"{module}.weight_scale_2" in made:
            scales = [made.pop(f"{module}.{suffix}") for suffix in ("weight_scale", "weight_scale_2")]
            if recipe == "nvfp4-fp8-vlm":
                assert torch.equal(made.pop(f"{module}.input_scale"), plain[f"{module}.input_scale"])
            if module != "lm_head":
                assert torch.equal(stored, plain[name]) and torch.equal(scales[1], plain[f"{module}.weight_scale_2"])
            error = (nvfp4.dequantize(stored, scales[0], scales[1]) - tensor.float()).norm() / tensor.float().norm()
            assert 0.02 < error < 0.13
            counted["nvfp4"] += 1
        elif f"{module}.weight_scale" in made:
            error = (fp8.dequantize(stored, made.pop(f"{module}.weight_scale")) - tensor.float()).norm() / tensor.float().norm()
            assert 0.01 < error < 0.03
            # one amax, divided by 448 and by 2688
            assert float(made.pop(f"{module}.input_scale")) == pytest.approx(6 * float(plain[f"{module}.input_scale"]), rel=1e-6)
            counted["fp8"] += 1
        else:
            assert stored.dtype == tensor.dtype and torch.equal(stored, tensor), name
    assert not made
    assert counted == {"fp8": 13, "nvfp4": 12 + (recipe == "w4a16-fp8-vlm")}


def test_fused_linears_share_both_scales(built: dict[str, Path]) -> None:
    made = weights(built["nvfp4-fp8-vlm"])
    for start, fused in (("0.", "linear_attn.in_proj_qkvz"), ("3.", "self_attn.qkv_proj")):
        for suffix in ("weight_scale", "input_scale"):
            assert len({float(made[f"model.language_model.layers.{start}{part}.{suffix}"]) for part in FUSED[fused]}) == 1


def test_any_number_of_workers_writes_the_same_bytes(built: dict[str, Path], tmp_path: Path) -> None:
    quantize(BUILTIN_MODEL, tmp_path / "two", small("w4a16-fp8-vlm"), calibration=["builtin"], silent=True, workers=2)
    one, two = (json.loads((path / "mtpress.json").read_text()) for path in (built["w4a16-fp8-vlm"], tmp_path / "two"))
    assert one["output_sha256"] == two["output_sha256"] and two["workers"]["count"] == 2


def test_a_dry_run_shows_bytes_by_format(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["quantize", str(BUILTIN_MODEL), str(tmp_path / "out"), "--recipe", "w4a16-fp8-vlm", "--calibration", "builtin"]
    assert main([*arguments, "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes_by_format"]["lm_head"] == {"nvfp4_w4a16": result["bytes_by_component"]["lm_head"]}
    assert set(result["bytes_by_format"]["gdn"]) == {"fp8", "bf16"}
    assert main([*arguments, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "FP8" in shown and "W4A16" in shown


def test_inspect_shows_bytes_by_format(built: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(built["nvfp4-fp8-vlm"]), "--json"]) == 0
    components = json.loads(capsys.readouterr().out)["components"]
    assert components["mlp"]["formats"].keys() == {"NVFP4"} and components["attention"]["formats"].keys() == {"FP8"}
    assert components["attention"]["bits"] == pytest.approx(8, abs=0.01)
    for part in components.values():
        assert sum(part["formats"].values()) == part["num_bytes"]
