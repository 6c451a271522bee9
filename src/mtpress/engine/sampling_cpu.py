"""A vLLM plugin: requests that sample, on vLLM's CPU platform without Triton, while a draft head drafts.

In: vLLM's stand-in for the kernel that repeats a request's temperature, top-p and top-k for each drafted token. Out: one
that writes its result. Leaves out: everything else. vLLM 0.32's (utils/cpu_triton_utils.py, _expand_kernel_impl) writes into
a copy whenever the values are not int64, which they never are here: the sampler then reads memory that nobody wrote, and
the first request that sets top_k ends the engine (vllm#42638 has the same symptom). Greedy requests do not come here.

vLLM calls `register` in each process it starts (entry point group vllm.general_plugins), before it puts its stand-ins in
place; it may be called more than once.
"""

import logging
from typing import Any

logger = logging.getLogger("vllm.plugins.mtpress_sampling_cpu")


def expand(output: Any, values: Any, cu_num_tokens: Any, replace_from: float, replace_to: float, MAX_NUM_TOKENS: Any = None) -> None:
    """Writes each of values [num_requests] as often as the request has tokens into output [num_tokens].

    cu_num_tokens [num_requests]: tokens of all requests up to and with this one. A value of replace_from becomes replace_to.
    """
    import torch

    lengths = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    output.copy_(torch.repeat_interleave(replaced, lengths))


def register() -> None:
    """Replaces the stand-in on the CPU, where there is one; on other platforms nothing changes."""
    try:
        from vllm.platforms import PlatformEnum, current_platform

        if current_platform._enum != PlatformEnum.CPU:
            return
        from vllm.utils import cpu_triton_utils

        stand_in = cpu_triton_utils._expand_kernel_impl
    except (ImportError, AttributeError) as error:
        logger.debug("this vLLM has no such stand-in: %s", error)
        return
    if stand_in is not expand:
        cpu_triton_utils._expand_kernel_impl = expand
        logger.debug("replaced %s", stand_in.__name__)
