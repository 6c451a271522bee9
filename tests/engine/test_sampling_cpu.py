import json
import subprocess
from pathlib import Path

import pytest
import torch

from mtpress.engine.sampling_cpu import expand

SCRIPT = Path(__file__).with_name("expand_on_cpu.py")
RIGHT = {"top_k": [20, 20, 50, 50, 50], "top_p": pytest.approx([0.95, 0.95, 1, 1, 1]), "temperature": [1, 1, 0.25, 0.25, 0.25]}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
def test_values_are_repeated_and_zero_is_replaced(dtype: torch.dtype) -> None:
    output = torch.full((4,), 99, dtype=dtype)
    expand(output, torch.tensor([3, 0, 5], dtype=dtype), torch.tensor([1, 3, 4], dtype=torch.int32), 0, 1, MAX_NUM_TOKENS=128)
    assert output.tolist() == [3, 1, 1, 5]


def expanded(kind: str, engine_python: Path, tmp_path: Path) -> dict[str, list[float]]:
    done = subprocess.run([str(engine_python), str(SCRIPT), kind, str(tmp_path / kind)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(json.loads((tmp_path / kind).read_text()))


@pytest.mark.engine
def test_the_sampler_gets_what_requests_said(engine_python: Path, tmp_path: Path) -> None:
    assert expanded("mended", engine_python, tmp_path) == RIGHT


@pytest.mark.engine
def test_without_the_plugin_it_reads_what_nobody_wrote(engine_python: Path, tmp_path: Path) -> None:
    """Red once vLLM has mended it: then the plugin and the known issue can go."""
    assert set(expanded("stock", engine_python, tmp_path)["top_k"]) == {-342886384.0}
