"""Mixed precision against the real modelopt 0.47: its own exports of mtpress-tiny, and ours of the same token ids.

Everything is the same bit for bit but one thing, which is on purpose: of FP8 linears that read one input, modelopt leaves each its own
weight scale, and mtpress gives them the largest, as vLLM does when it loads them. There the codes are held against modelopt's own
function, asked for that scale (it is PyTorch's division and cast, tests/formats/test_fp8.py has the numbers).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpress.builtin import BUILTIN_MODEL, CALIBRATION_FILE
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.models.qwen3_5.names import MTP_TENSORS
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize
from real_exports import NUM_SAMPLES, real_export

pytestmark = pytest.mark.oracle
BUILDS = {"modelopt-fp8": "nvfp4-fp8-vlm", "modelopt-w4a16-fp8": "w4a16-fp8-vlm"}
FUSED_FP8 = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z")
MOVED = 1 / 32  # of input_scale, on another transformers and with another delta rule: see test_modelopt_parity.py


@pytest.fixture(scope="module", params=list(BUILDS))
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(ours, modelopt's)."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = [line for line in CALIBRATION_FILE.read_text(encoding="utf-8").splitlines() if "image" not in line][:NUM_SAMPLES]
    (folder / "calibration.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    calibration = [str(folder / "calibration.jsonl")]
    quantize(BUILTIN_MODEL, folder / "ours", BUILDS[request.param], calibration=calibration, device="cpu", silent=True)
    return folder / "ours", real_export(request.param)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def test_every_tensor_is_modelopts(builds: tuple[Path, Path]) -> None:
    ours, theirs = (Checkpoint.open(path) for path in builds)
    assert ours.tensors.keys() - theirs.tensors.keys() == set(MTP_TENSORS) and not theirs.tensors.keys() - ours.tensors.keys()
    fused, moved, seen = set(), set(), set()
    for name in theirs.tensors:
        a, b = ours.read(name), theirs.read(name)
        seen.add((a.dtype, name.rpartition(".")[2]))
        if same(a, b):
            continue
        module, _, suffix = name.rpartition(".")
        if suffix == "input_scale":
            moved.add(name)
            assert abs(float(a / b) - 1) <= MOVED, name
        else:
            assert module.endswith(FUSED_FP8) and suffix in ("weight", "weight_scale"), name
            fused.add(module)
    assert {(torch.float8_e4m3fn, "weight"), (torch.uint8, "weight"), (torch.float32, "input_scale")} <= seen
    for module in fused:
        own, shared = theirs.read(f"{module}.weight_scale"), ours.read(f"{module}.weight_scale")
        weight = Checkpoint.open(BUILTIN_MODEL).read(f"{module}.weight")
        assert shared > own and same((weight / own).to(torch.float8_e4m3fn), theirs.read(f"{module}.weight"))
        assert same((weight / shared).to(torch.float8_e4m3fn), ours.read(f"{module}.weight"))
        group = next(group for group in (FUSED_FP8[:3], FUSED_FP8[3:]) if module.endswith(group))
        start = module.removesuffix(next(part for part in group if module.endswith(part)))
        assert float(shared) == max(float(theirs.read(f"{start}{part}.weight_scale")) for part in group)
    assert len(fused) == 5  # of q, k, v and three times qkv, z, those that have not the largest
    assert not [name for name in moved if ".layers.0.linear_attn.in_proj_" in name]  # what no layer has touched


def configs(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return config, json.loads((path / "hf_quant_config.json").read_text(encoding="utf-8"))


def test_both_configs_are_modelopts_but_for_the_list_of_what_is_spared(builds: tuple[Path, Path]) -> None:
    (ours, our_file), (theirs, their_file) = (configs(path) for path in builds)
    assert theirs["ignore"] == [] and "exclude_modules" not in their_file["quantization"]
    assert ours["ignore"] == our_file["quantization"].pop("exclude_modules")
    assert not set(ours["ignore"]) & ours["quantized_layers"].keys()
    assert {**ours, "ignore": []} == theirs
    assert our_file == their_file


def test_check_finds_nothing_but_the_draft_head_that_modelopt_drops(builds: tuple[Path, Path]) -> None:
    ours, theirs = builds
    assert check(ours, BUILTIN_MODEL, silent=True).findings == ()
    found = check(theirs, BUILTIN_MODEL, silent=True)
    assert [finding.id for finding in found.findings] == ["mtp-missing"]
    assert found.comparison is not None and not found.comparison.not_compared
