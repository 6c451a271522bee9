"""The stand-in for vLLM's expand_kernel, by itself and inside the pinned vLLM."""

import subprocess
from pathlib import Path

import pytest
import torch

from mtpress.engine.plugins.sampling_cpu import expand


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_each_value_is_repeated_over_its_tokens(dtype: torch.dtype) -> None:
    """The example of vLLM's docstring: x = [a, b, c], cu_num_tokens = [2, 5, 6] → [a, a, b, b, b, c]."""
    output = torch.full((6,), 99, dtype=dtype)
    expand(output, torch.tensor([20, -1, 7], dtype=dtype), torch.tensor([2, 5, 6], dtype=torch.int32), -1, 1, 128)
    assert output.dtype == dtype
    assert output.tolist() == [20, 20, 1, 1, 1, 7]


def test_requests_without_drafts_take_no_room() -> None:
    output = torch.zeros(2)
    expand(output, torch.tensor([0.7, 0.2]), torch.tensor([0, 2], dtype=torch.int32), -1, 1)
    assert output.tolist() == pytest.approx([0.2, 0.2])


IN_VLLM = """
import torch
from mtpress.engine.plugins import sampling_cpu
from vllm.platforms import current_platform

def told():
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens
    for _ in range(20):
        torch.full((6,), 77, dtype=torch.int32)  # leaves something else in the memory that is handed out next
        if expand_batch_to_tokens(torch.tensor([20, 5, 7], dtype=torch.int32), torch.tensor([2, 5, 6]), 6).tolist() != [20, 20, 5, 5, 5, 7]:
            return "wrong"
    return "right"

current_platform.register_triton_kernel_overrides()
print("answer", told())
sampling_cpu.register()
current_platform.register_triton_kernel_overrides()
print("answer", told())
"""


@pytest.mark.engine
def test_vllm_samples_with_it(engine_python: Path) -> None:
    """Without it the pinned vLLM is wrong; once a later one is right, this file and the plugin can go."""
    done = subprocess.run([str(engine_python), "-c", IN_VLLM], capture_output=True, text=True, timeout=300)
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer")]
    assert answers == ["answer wrong", "answer right"], done.stdout + done.stderr[-2000:]
