"""Small checkpoints with random weights in the layout of Qwen3.6-27B: vision tower, draft head, tokenizer, template.

In: the sizes that differ, and a seed. Out: a directory that transformers, modelopt and mtpress all load. Leaves out:
sense; what it says is noise.

The weights are chosen to be hard on an NVFP4 packer: a few input channels are 16 times larger, as in trained models,
whole rows and blocks are zero, and one matrix holds nothing but rounding ties.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat import template as templating
from mtpress.formats import nvfp4
from mtpress.models.qwen3_5 import names as qwen3_5

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
TEMPLATE = Path(templating.__file__).with_name("qwen3_5.jinja")
VOCAB_SIZE = 320  # 256 bytes, the specials, and padding rows as in the real model
TIES_MATRIX = "layers.0.mlp.down_proj.weight"


def write_tokenizer(out: Path) -> dict[str, int]:
    """A byte-level tokenizer without merges: every byte is a token. Returns the ids of the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "model_max_length": 4096}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    (out / "chat_template.jinja").write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    return {token: tokenizer.token_to_id(token) for token in SPECIALS}


def config(ids: dict[str, int], sizes: dict[str, int], tied: bool) -> dict[str, Any]:
    """config.json; `sizes` are text_config's own keys."""
    rotary = sizes["head_dim"] // 4  # half of a head turns, in pairs: what is split among time, height and width
    side = rotary // 3
    text = {
        "model_type": "qwen3_5_text", "dtype": "bfloat16", "vocab_size": VOCAB_SIZE, "hidden_act": "silu", "rms_norm_eps": 1e-06,
        "attention_bias": False, "attn_output_gate": True, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(sizes["num_hidden_layers"])],
        "mamba_ssm_dtype": "float32", "max_position_embeddings": 4096, "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False, "eos_token_id": ids["<|im_end|>"], "tie_word_embeddings": tied,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_interleaved": True,
            "mrope_section": [rotary - 2 * side, side, side],
        },
        **sizes,
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_5", "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "in_channels": 3,
        "out_hidden_size": sizes["hidden_size"], "num_position_embeddings": 64, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "deepstack_visual_indexes": [], "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "text_config": text, "vision_config": vision,
        "tie_word_embeddings": tied, "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
    }  # fmt: skip


def ties(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """BF16 [N, K] whose scaled values lie exactly on the bounds between two codes, but for one 6 in each block.

    The largest weight is 6·448·2⁻¹⁴, so scale_2 is 2⁻¹⁴; each block's largest is 6·2ⁱ⁻¹⁴, so its scale is 2ⁱ.
    """
    n, k = shape
    bounds = torch.tensor([sign * bound for bound in nvfp4.BOUNDS for sign in (1, -1)])
    scaled = bounds[torch.randint(len(bounds), (n, k // 16, 16), generator=generator)]
    scaled[..., 0] = 6.0
    powers = torch.randint(-6, 9, (n, k // 16, 1), generator=generator).float()
    weight = scaled * 2.0 ** (powers - 14)
    weight[0, 0, :] = 6 * 448 * 2.0**-14
    return weight.view(n, k).to(torch.bfloat16)


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """BF16 weights of a size that keeps activations alive: norms near what training gives them, matrices about 1/√K."""
    noise = torch.randn(shape, generator=generator)
    last = name.removesuffix(".weight").rpartition(".")[2]
    if name.endswith(TIES_MATRIX):
        return ties(shape, generator)
    if last == "A_log":
        values = torch.rand(shape, generator=generator).mul(15).add(1).log()
    elif name.endswith("linear_attn.norm.weight") or name.startswith(qwen3_5.VISION_PREFIX):
        values = 1 + 0.1 * noise if last.startswith("norm") else 0.05 * noise
    elif len(shape) == 1:
        values = 0.1 * noise
    elif last == "embed_tokens":
        values = noise
    elif last == "conv1d":
        values = 0.3 * noise
    else:
        values = noise / math.sqrt(shape[1])
        values[:, torch.randint(shape[1], (max(1, shape[1] // 64),), generator=generator)] *= 16
        values[0] = 0
        values[1, : shape[1] // 2] = 0
        values[2] *= 1e-5  # blocks whose scale would fall below the smallest E4M3
    return values.to(torch.bfloat16)


def write_checkpoint(out: Path, sizes: dict[str, int], *, tied: bool = False, seed: int = 0) -> Path:
    """Writes a whole BF16 checkpoint into `out`, which must not exist, and returns it."""
    out.mkdir(parents=True)
    settings = config(write_tokenizer(out), sizes, tied)
    shapes = dict(qwen3_5.body_shapes(settings, "model.language_model.")) | qwen3_5.mtp_shapes(settings) | qwen3_5.vision_shapes(settings)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for processor in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copyfile(BUILTIN_MODEL / processor, out / processor)
    (out / "config.json").write_text(json.dumps(settings, indent=1))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": settings["text_config"]["eos_token_id"], "do_sample": False}))
    return out
