"""The oracle: what compressed-tensors' own decompressor and transformers make of a compressed-tensors NVFP4 checkpoint.

    .envs/llmcompressor/bin/python tests/oracles/compressed_tensors_dequantize.py CKPT OUT.safetensors [ANSWER.json QUESTION]

In: a checkpoint. Out: the BF16 weight of every NVFP4 linear by its module's name; with ANSWER.json, which parameters transformers found
missing or in excess, and the greedy answer to a question. Runs on the packages of locks/llmcompressor.txt and imports nothing of mtpress.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

PACKED = ".weight_packed"
PARTS = ("weight_packed", "weight_scale", "weight_global_scale")
MAX_TOKENS = 16


def dequantize(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Module → BF16 weight [N, K]."""
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    stored: dict[str, torch.Tensor] = {}
    for shard in checkpoint.glob("*.safetensors"):
        stored |= load_file(shard)
    modules = [name.removesuffix(PACKED) for name in stored if name.endswith(PACKED)]
    return {m: NVFP4PackedCompressor.decompress({part: stored[f"{m}.{part}"] for part in PARTS}, scheme)["weight"] for m in modules}


def ask(checkpoint: Path, question: str) -> dict[str, object]:
    """What loading found, and the answer."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, found = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {**{key: sorted(found[key]) for key in keys}, "answer": tokenizer.decode(tokens, skip_special_tokens=True)}


def main() -> None:
    checkpoint, out = map(Path, sys.argv[1:3])
    save_file({name: weight.contiguous() for name, weight in dequantize(checkpoint).items()}, out)
    if len(sys.argv) > 3:
        Path(sys.argv[3]).write_text(json.dumps(ask(checkpoint, sys.argv[4])))


if __name__ == "__main__":
    main()
