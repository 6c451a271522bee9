"""The blocks into which vLLM divides its KV cache for a model of full-attention and Gated-DeltaNet layers.

In: config.json and the settings that shape a block. Out: `KvBlocks`: how large a block is, how many a sequence takes, and from
those vLLM's own figures. Leaves out: how much memory there is for them (memory_model.py).

All layers draw blocks from one pool, so all pages have one size: the attention block grows until a page of it holds a
Gated-DeltaNet state, and the state is padded to that page. Layers are dealt into groups of equal size, and a block holds one
page for each layer of a group: 27B has 16 attention layers and 48 states, hence one group of the former and three of the
latter; the draft head makes it 17, and three groups of 17 are padded.
Source: vLLM 0.32, platforms/interface.py (_align_hybrid_block_size), v1/core/kv_cache_utils.py
(_get_kv_cache_groups_uniform_page_size, get_max_concurrency_for_kv_cache_config), v1/kv_cache_interface.py (MambaSpec),
model_executor/layers/mamba/mamba_utils.py (gated_delta_net_state_shape).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtpress.models.qwen3_5 import names as qwen3_5

# The smallest block: CUDA's attention backends take multiples of 16, vLLM's CPU platform starts from 128.
CUDA_BLOCK_SIZE, CPU_BLOCK_SIZE = 16, 128
STATE_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Bits of an entry, and bytes of scales beside the entries of a head, by --kv-cache-dtype (v1/attention/backends' customize_spec).
# TurboQuant without the layers at both ends, which it leaves in 16 bits.
KV_BITS: dict[str, tuple[float, float]] = {
    "auto": (16, 0), "bfloat16": (16, 0), "float16": (16, 0),
    "fp8": (8, 0), "fp8_e4m3": (8, 0), "fp8_e5m2": (8, 0), "nvfp4": (4.5, 0), "nvfp4_4over6": (4.5, 0),
    "int8_per_token_head": (8, 8), "fp8_per_token_head": (8, 8), "int4_per_token_head": (4, 8),
    "turboquant_k8v4": (6, 4), "turboquant_4bit_nc": (4, 6), "turboquant_k3v4_nc": (3.5, 6), "turboquant_3bit_nc": (3, 6),
}  # fmt: skip


@dataclass(frozen=True)
class KvBlocks:
    """One pool of blocks. Sizes are those of one GPU.

    block_size: tokens of a full-attention block; page_bytes: one layer's part of a block; layers_per_block: layers of a group.
    attention_groups, state_groups: groups of each kind; states_per_sequence: blocks that a sequence takes of a state group.
    """

    block_size: int
    page_bytes: int
    layers_per_block: int
    attention_groups: int
    state_groups: int
    states_per_sequence: int

    @property
    def bytes_per_block(self) -> int:
        return self.page_bytes * self.layers_per_block

    @property
    def state_blocks(self) -> int:
        """Blocks of state that a sequence of any length takes."""
        return self.state_groups * self.states_per_sequence

    def blocks_per_sequence(self, num_tokens: int) -> int:
        return self.attention_groups * -(-num_tokens // self.block_size) + self.state_blocks

    def concurrency(self, num_blocks: int, max_model_len: int) -> float:
        """vLLM's "Maximum concurrency for max_model_len tokens per request"."""
        return num_blocks / self.blocks_per_sequence(max_model_len)

    def num_tokens(self, num_blocks: int, max_model_len: int) -> int:
        """vLLM's "KV cache size": so many sequences of max_model_len, in tokens."""
        return int(self.concurrency(num_blocks, max_model_len) * max_model_len)

    def longest_sequence(self, num_blocks: int) -> int:
        """Tokens of the longest sequence that vLLM starts with; it keeps one block for itself."""
        return max(0, (num_blocks - 1 - self.state_blocks) // self.attention_groups) * self.block_size

    def num_sequences(self, num_blocks: int) -> int:
        """Sequences that can run at once while each is no longer than a block."""
        return max(0, (num_blocks - 1) // (self.attention_groups + self.state_blocks))


def kv_bytes_per_token(config: Mapping[str, Any], kv_cache_dtype: str = "auto", tensor_parallel_size: int = 1) -> int:
    """Keys and values of one token in one full-attention layer; a head that cannot be split is held by several GPUs."""
    d = qwen3_5.sizes(config)
    bits, scale_bytes = KV_BITS[kv_cache_dtype]
    heads = max(1, d["num_key_value_heads"] // tensor_parallel_size)
    return heads * math.ceil(2 * d["head_dim"] * bits / 8 + scale_bytes)


def state_bytes(config: Mapping[str, Any], num_speculative_tokens: int = 0, tensor_parallel_size: int = 1) -> int:
    """One Gated-DeltaNet layer's state of a sequence: a matrix a head, and the convolution's last inputs in 16 bits.

    With speculation the convolution keeps one input more for every draft token.
    """
    d = qwen3_5.sizes(config)
    keys = d["linear_num_key_heads"] * d["linear_key_head_dim"]
    values = d["linear_num_value_heads"] * d["linear_value_head_dim"]
    dtype = qwen3_5.text_config(config).get("mamba_ssm_dtype")
    recurrent = STATE_DTYPE_BYTES.get(str(dtype), 2) * values * d["linear_key_head_dim"]
    convolution = 2 * (2 * keys + values) * (d["linear_conv_kernel_dim"] - 1 + num_speculative_tokens)
    return (recurrent + convolution) // tensor_parallel_size


def kv_blocks(
    config: Mapping[str, Any],
    *,
    kv_cache_dtype: str = "auto",
    num_speculative_tokens: int = 0,
    tensor_parallel_size: int = 1,
    prefix_caching: bool = True,
    block_size: int = CUDA_BLOCK_SIZE,
) -> KvBlocks:
    """The pool of a launch. block_size: the smallest that the platform or the user asks for; InputError for a broken config."""
    types = qwen3_5.layer_types(config)
    draft = max(1, qwen3_5.num_mtp_layers(config)) if num_speculative_tokens else 0
    attention, states = types.count("full_attention") + draft, types.count("linear_attention")
    per_token = kv_bytes_per_token(config, kv_cache_dtype, tensor_parallel_size)
    state = state_bytes(config, num_speculative_tokens, tensor_parallel_size) if states else 0
    size = block_size * max(1, -(-state // (block_size * per_token)))
    counts = [number for number in (attention, states) if number]
    # Few layers of one kind set the size of a group; where both are about as many, padding the smaller kind wastes less.
    group = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return KvBlocks(
        block_size=size,
        page_bytes=size * per_token,
        layers_per_block=group,
        attention_groups=max(1, -(-attention // group)),
        state_groups=-(-states // group),
        # Prefix caching keeps the state at the last block's start too; every draft token has a state to return to.
        states_per_sequence=(2 if prefix_caching else 1) + num_speculative_tokens,
    )
