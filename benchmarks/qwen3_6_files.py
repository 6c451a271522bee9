"""Everything of a Qwen3.6 checkpoint but its weights, for any depth and width.

In: a `Width` and a depth. Out: config.json and the files beside it, as bytes. Leaves out: weights (random_weights.py).

The tokenizer is honest but small: one token a byte, no merges, and Qwen's 33 added tokens at Qwen's own ids (image_pad
is 248056) where the vocabulary reaches that far, at its end where it does not. The ids between are never produced.
Chat template: the one that ships with mtpress.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

TEMPLATE = Path(__file__).parents[1] / "src/mtpress/chat/qwen3_5.jinja"
FIRST_ADDED_ID = 248044
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
    "<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>", "<tts_text_eod>", "<tts_text_bos_single>",
    "<|audio_pad|>",
)  # fmt: skip
SHOWN = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}
SHOWN |= {token for token in SPECIAL if "fim" in token or token in ("<|repo_name|>", "<|file_sep|>")}
MIN_VOCAB_SIZE = 256 + len(SPECIAL)


@dataclass(frozen=True)
class Width:
    """Every dimension but the number of layers, under the names of text_config; the defaults are Qwen3.6-27B's."""

    hidden_size: int = 5120
    intermediate_size: int = 17408
    vocab_size: int = 248320
    num_attention_heads: int = 24
    num_key_value_heads: int = 4
    head_dim: int = 256
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 48
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    vision_depth: int = 27
    vision_hidden_size: int = 1152
    vision_intermediate_size: int = 4304
    vision_num_heads: int = 16
    vision_num_position_embeddings: int = 2304

    @property
    def ids(self) -> dict[str, int]:
        """Added token → id."""
        assert self.vocab_size >= MIN_VOCAB_SIZE
        first = min(FIRST_ADDED_ID, self.vocab_size - len(SPECIAL))
        return {token: first + i for i, token in enumerate(SPECIAL)}


TINY = Width(
    hidden_size=256, intermediate_size=512, vocab_size=512, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
    vision_depth=2, vision_hidden_size=128, vision_intermediate_size=256, vision_num_heads=4, vision_num_position_embeddings=64,
)  # fmt: skip
WIDTHS = {"27b": Width(), "tiny": TINY}


def text_config(width: Width, num_layers: int) -> dict[str, Any]:
    pairs = width.head_dim // 8  # a quarter of the head rotates, two values a frequency: 32 at head_dim 256
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "bos_token_id": width.ids["<|endoftext|>"],
        "dtype": "bfloat16",
        "eos_token_id": width.ids["<|endoftext|>"],
        "full_attention_interval": 4,
        "head_dim": width.head_dim,
        "hidden_act": "silu",
        "hidden_size": width.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": width.intermediate_size,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(num_layers)],
        "linear_conv_kernel_dim": width.linear_conv_kernel_dim,
        "linear_key_head_dim": width.linear_key_head_dim,
        "linear_num_key_heads": width.linear_num_key_heads,
        "linear_num_value_heads": width.linear_num_value_heads,
        "linear_value_head_dim": width.linear_value_head_dim,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": width.num_attention_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": width.num_key_value_heads,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [(pairs + 2 - i) // 3 for i in range(3)],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": width.vocab_size,
    }


def config(width: Width, num_layers: int) -> dict[str, Any]:
    """config.json as Qwen3.6 writes it."""
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": width.ids["<|image_pad|>"],
        "language_model_only": False,
        "model_type": "qwen3_5",
        "text_config": text_config(width, num_layers),
        "tie_word_embeddings": False,
        "video_token_id": width.ids["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": width.vision_depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": width.vision_hidden_size,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": width.vision_intermediate_size,
            "model_type": "qwen3_5",
            "num_heads": width.vision_num_heads,
            "num_position_embeddings": width.vision_num_position_embeddings,
            "out_hidden_size": width.hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": width.ids["<|vision_end|>"],
        "vision_start_token_id": width.ids["<|vision_start|>"],
    }


def added_tokens(width: Width) -> dict[int, dict[str, Any]]:
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {i: {"content": token, **plain, "special": token not in SHOWN} for token, i in width.ids.items()}


def tokenizer(width: Width) -> dict[str, Any]:
    """tokenizer.json; the added tokens stand in the vocabulary too, which is what pins their ids."""
    bytes_ = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **token} for i, token in added_tokens(width).items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": bytes_ | width.ids, "merges": [],
        },
    }  # fmt: skip


def tokenizer_config(width: Width) -> dict[str, Any]:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): token for i, token in added_tokens(width).items()},
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "image_token": "<|image_pad|>",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }


def processor(**more: Any) -> dict[str, Any]:
    return {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        **more,
    }


def files(width: Width, num_layers: int) -> dict[str, bytes]:
    """Name → content of every file of the checkpoint but shards and index."""
    ids = width.ids
    contents = {
        "config.json": config(width, num_layers),
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "temperature": 1.0,
            "top_k": 20,
            "top_p": 0.95,
        },
        "preprocessor_config.json": processor(image_processor_type="Qwen2VLImageProcessorFast"),
        "tokenizer.json": tokenizer(width),
        "tokenizer_config.json": tokenizer_config(width),
        "video_preprocessor_config.json": processor(video_processor_type="Qwen3VLVideoProcessor"),
    }
    written = {name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in contents.items()}
    return written | {"chat_template.jinja": TEMPLATE.read_bytes()}
