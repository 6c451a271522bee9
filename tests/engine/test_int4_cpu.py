"""The plugin for INT4 on the CPU, inside the pinned vLLM: the same products with and without a kernel for this processor."""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.engine

SCRIPT = Path(__file__).with_name("int4_kernel_on_cpu.py")


@pytest.mark.parametrize("kernel", [[], ["--without-kernel"]], ids=["this processor's", "none"])
def test_weights_are_codes_times_scales_and_activations_stay(kernel: list[str], engine_python: Path, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (256, 64), generator=random)
    scales = (0.01 * torch.randn(2, 64, generator=random)).half()  # of both signs
    packed = sum(codes.view(32, 8, 64)[:, place] << 4 * place for place in range(8))
    stored, made = tmp_path / "stored.safetensors", tmp_path / "made.safetensors"
    save_file({"qweight": packed.to(torch.int32), "scales": scales}, stored)
    command = [str(engine_python), str(SCRIPT), str(stored), str(made), *kernel]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, weight in load_file(made).items():
        dtype = getattr(torch, name)
        expected = (codes - 8).float().view(2, 128, 64) * scales.to(dtype).float().unsqueeze(1)
        assert torch.equal(weight, expected.view(256, 64).to(dtype).t()), name
