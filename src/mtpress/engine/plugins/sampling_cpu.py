"""A vLLM plugin: sampled requests with speculative decoding on vLLM's CPU platform.

vLLM 0.32's stand-in for the kernel that repeats each request's temperature, top_k and top_p over its drafted tokens fills an int64
copy of its output and drops it, unless the output is int64 itself, which it never is. What is left is uninitialised memory: a
request with a temperature gets arbitrary text, one with top_k brings the engine down ("index … is out of bounds"). The stand-in
here says the same in PyTorch, for every dtype. Leaves out: greedy requests, which never come here, and other platforms. Harmless
where Triton runs on the CPU, or where a later vLLM has another stand-in: then nothing asks for this one, or it is right as well.

vLLM calls `register` in each process it starts, before it registers its stand-ins.
"""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("vllm.plugins.mtpress_sampling_cpu")


def register() -> None:
    """Puts `expand` in the place of vLLM's stand-in, on the CPU only."""
    try:
        from vllm.platforms import PlatformEnum, current_platform

        if current_platform._enum != PlatformEnum.CPU:
            return
        from vllm.utils import cpu_triton_utils

        cpu_triton_utils._expand_kernel_impl  # noqa: B018  AttributeError where there is none
    except (ImportError, AttributeError) as error:
        logger.debug("this vLLM has no stand-in for expand_kernel: %s", error)
        return
    cpu_triton_utils._expand_kernel_impl = expand


def expand(
    output: "torch.Tensor",
    values: "torch.Tensor",
    cu_num_tokens: "torch.Tensor",
    replace_from: float,
    replace_to: float,
    max_num_tokens: int | None = None,
) -> None:
    """output[num_tokens] ← values[batch], each as often as its request has tokens; replace_from becomes replace_to.

    cu_num_tokens[batch]: running sum of tokens. As expand_kernel in vllm/v1/sample/rejection_sampler.py (0.32).
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    replaced = values.masked_fill(values == replace_from, replace_to)
    output[: int(counts.sum())] = replaced.repeat_interleave(counts)
