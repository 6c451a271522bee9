"""What vLLM holds back on a GPU beside weights and KV cache: activations, logits, the vision tower's work, CUDA graphs, libraries.

In: config.json and the settings of a launch. Out: bytes a GPU. Leaves out: measuring; vLLM itself runs a batch of the largest
size to find out, so this is an estimate by shapes, set against what people have reported (docs/serving.md).

    reserved = max(body, logits, vision) + workspaces + libraries + CUDA graphs (+ NCCL for several GPUs)
    body     = max_num_batched_tokens · 2 bytes · (3 · intermediate_size / TP + 4 · hidden_size)
    logits   = max_num_seqs (twice with MTP) · vocab_size · 16 bytes: BF16, float32, sorted values and their places
    vision   = one picture of 16,384 tokens: 65,536 patches · 2 bytes · (intermediate_size + 8 · hidden_size) / TP, and its features
"""

from collections.abc import Mapping
from typing import Any

from mtpress.models.qwen3_5 import names as qwen3_5

MIB = 1 << 20
LOGIT_BYTES = 16  # recipes#810: 256 sequences against 8 cost 14 blocks of 51.4 MB
IMAGE_TOKENS = 16_384  # the largest picture the family's processor makes, which vLLM profiles with
WORKSPACE_BYTES = 394 * MIB  # FlashInfer's attention workspace (vLLM 0.32, envs.py)
LIBRARY_BYTES = 150 * MIB  # kernels that are loaded after vLLM has looked at the free memory
NCCL_BYTES = 768 * MIB  # club-3090#1087: 15.03 GiB taken where the weights have 14.28
GRAPH_BYTES, ONE_GRAPH_BYTES = 128 * MIB, 4 * MIB  # club-3090#1087 and #104: 0.13 and 0.49 GiB in all
MAX_CAPTURE_SIZE = 512  # tokens of the largest CUDA graph (vLLM 0.32, config/vllm.py)
CUDA_CONTEXT_BYTES = 600 * MIB  # taken before vLLM looks, so no part of its budget, but of the free memory


def num_graphs(max_num_seqs: int, num_speculative_tokens: int) -> int:
    """CUDA graphs that vLLM captures: one a batch size, for whole steps and for pieces of them."""
    largest = min(max_num_seqs * (1 + num_speculative_tokens) * 2, MAX_CAPTURE_SIZE)
    sizes = [1, 2, 4, *range(8, min(largest + 1, 256), 8), *range(256, largest + 1, 16)]
    return 2 * len([size for size in sizes if size <= largest])


def activation_bytes(
    config: Mapping[str, Any], *, num_tokens: int, num_sequences: int, num_speculative_tokens: int, vision: bool, tensor_parallel_size: int
) -> int:
    """The peak of the batch that vLLM profiles with."""
    d = qwen3_5.sizes(config)
    body = num_tokens * 2 * (3 * d["intermediate_size"] // tensor_parallel_size + 4 * d["hidden_size"])
    logits = num_sequences * (2 if num_speculative_tokens else 1) * d["vocab_size"] * LOGIT_BYTES
    return max(body, logits, _vision_bytes(config, tensor_parallel_size) if vision else 0)


def _vision_bytes(config: Mapping[str, Any], tensor_parallel_size: int) -> int:
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping):
        return 0
    sizes = [tower.get(key) for key in ("hidden_size", "intermediate_size", "spatial_merge_size", "out_hidden_size")]
    if not all(isinstance(size, int) for size in sizes):
        return 0
    hidden, inter, merge, out = (int(size or 0) for size in sizes)
    return IMAGE_TOKENS * (merge**2 * 2 * (inter + 8 * hidden) // tensor_parallel_size + 2 * out)


def reserved_bytes(
    config: Mapping[str, Any],
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    num_speculative_tokens: int = 0,
    vision: bool = False,
    tensor_parallel_size: int = 1,
    enforce_eager: bool = False,
) -> int:
    """What a GPU holds beside weights and KV cache, within --gpu-memory-utilization."""
    peak = activation_bytes(
        config,
        num_tokens=max_num_batched_tokens,
        num_sequences=max_num_seqs,
        num_speculative_tokens=num_speculative_tokens,
        vision=vision,
        tensor_parallel_size=tensor_parallel_size,
    )
    graphs = 0 if enforce_eager else GRAPH_BYTES + ONE_GRAPH_BYTES * num_graphs(max_num_seqs, num_speculative_tokens)
    return peak + WORKSPACE_BYTES + LIBRARY_BYTES + graphs + (NCCL_BYTES if tensor_parallel_size > 1 else 0)
