"""What vLLM's sampler gets for temperatures, top-p and top-k of requests that draft; runs under the engine's python.

python expand_on_cpu.py {stock|mended} FOUND.json
"""

import json
import sys
from pathlib import Path

import torch
from vllm.platforms import current_platform

if sys.argv[1] == "mended":
    from mtpress.engine.plugins import sampling_cpu

    sampling_cpu.register()
    sampling_cpu.register()
current_platform.register_triton_kernel_overrides()

from vllm.v1.sample import rejection_sampler  # noqa: E402  (the stand-ins are put in place when it is imported)

STALE = -342886384


def expanded(values: torch.Tensor, replace_from: int = 0, replace_to: int = 0) -> list[float]:
    cumulative = torch.tensor([2, 2, 5], dtype=torch.int32)
    output = torch.full((5,), STALE, dtype=values.dtype)  # what uninitialised memory may hold
    new_empty = torch.Tensor.new_empty
    torch.Tensor.new_empty = lambda self, *size: output  # type: ignore[method-assign]
    try:
        return [float(x) for x in rejection_sampler.expand_batch_to_tokens(values, cumulative, 5, replace_from, replace_to)]
    finally:
        torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]


found = {
    "top_k": expanded(torch.tensor([20, 7, 50], dtype=torch.int32)),
    "top_p": expanded(torch.tensor([0.95, 0.5, 1.0])),
    "temperature": expanded(torch.tensor([0.0, 0.7, 0.25]), 0, 1),
}
Path(sys.argv[2]).write_text(json.dumps(found))
