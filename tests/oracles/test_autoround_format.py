"""INT4 against auto-round 0.16.1's own rounding, packing and layers: the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtpress.builtin import BUILTIN_MODEL
from mtpress.formats import int4
from mtpress.rounding import rtn, search

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rounding"))
from int4_samples import hard, sample

pytestmark = pytest.mark.oracle
SCRIPT = Path(__file__).with_name("autoround_pack.py")
PARTS = (int4.QWEIGHT, int4.QZEROS, int4.SCALES)


def matrices() -> dict[str, Tensor]:
    stored = load_file(BUILTIN_MODEL / "model.safetensors")
    layer = "model.language_model.layers.1."
    real = {part: stored[f"{layer}{part}.weight"] for part in ("mlp.gate_proj", "mlp.down_proj", "linear_attn.in_proj_z")}
    return {"normal": sample("normal", 64, 512), "laplace": sample("laplace", 96), "hard": hard(), **real}


@pytest.fixture(scope="module")
def theirs(autoround_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What auto-round makes of the matrices; under `searched.NAME` what it makes of searched weights and their scales."""
    folder, given = tmp_path_factory.mktemp("autoround"), {}
    for name, weight in matrices().items():
        given[f"{name}.weight"] = weight.contiguous()
        codes, scales = search.round_matrix(weight)
        given[f"searched.{name}.weight"] = int4.dequantize(*int4.tensors(codes, scales).values())
        given[f"searched.{name}.scale"] = scales
    save_file(given, folder / "in.safetensors")
    command = [str(autoround_python), str(SCRIPT), str(folder / "in.safetensors"), str(folder / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "out.safetensors")


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", list(matrices()))
def test_plain_rounding_is_auto_round_s(name: str, theirs: dict[str, Tensor]) -> None:
    ours = int4.tensors(*rtn.round_matrix(matrices()[name]))
    for part in PARTS:
        assert same(ours[part], theirs[f"{name}.{part}"]), part


@pytest.mark.parametrize("name", list(matrices()))
def test_packing_is_auto_round_s(name: str, theirs: dict[str, Tensor]) -> None:
    ours = int4.tensors(*search.round_matrix(matrices()[name]))
    for part in PARTS:
        assert same(ours[part], theirs[f"searched.{name}.{part}"]), part


@pytest.mark.parametrize("convention", ["", ".as_is"])
@pytest.mark.parametrize("name", list(matrices()))
def test_both_conventions_are_read_as_auto_round_s_layers_read_them(name: str, convention: str, theirs: dict[str, Tensor]) -> None:
    for start in (f"{name}{convention}", f"searched.{name}{convention}"):
        stored = [theirs[f"{start}.{part}"] for part in PARTS]
        assert int4.zero_points(stored[1]).unique().tolist() == [8]
        read = int4.dequantize(*stored).half().float()  # its layer in PyTorch multiplies in FP16
        rows = read.isfinite().all(1)
        assert rows.sum() >= len(rows) - 1 and torch.equal(read[rows], theirs[f"{start}.read"][rows])


def test_the_two_conventions_differ(theirs: dict[str, Tensor]) -> None:
    assert theirs["normal.qzeros"].unique().tolist() == [0x77777777]
    assert theirs["normal.as_is.qzeros"].unique().tolist() == [0x88888888 - (1 << 32)]
