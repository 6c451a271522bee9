"""The oracle: llm-compressor's own NVFP4 build of a checkpoint, with the recipe of its examples for Qwen3.5 and Qwen3.6.

    .envs/llmcompressor/bin/python tests/oracles/llmcompressor_export.py SRC OUT TOKENS.json [--gdn]

In: a BF16 qwen3_5 checkpoint and a JSON list of token-id lists. Out: what oneshot and save_pretrained write: compressed-tensors
nvfp4-pack-quantized, the draft head copied in BF16 into a shard of its own, tokenizer and processor files written anew by
transformers. The examples leave the whole of linear_attn in BF16; --gdn quantizes its three large projections too, as people
do for size. Leaves out: quality, which a few samples cannot give. Runs on the packages of locks/llmcompressor.txt and imports
nothing of mtpress.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.utils import load_context
from transformers import AutoProcessor, Qwen3_5ForConditionalGeneration

KEPT = ["re:.*lm_head", "re:visual.*", "re:model.visual.*", "re:.*embed_tokens$"]
KEPT_OF_GDN = {False: "re:.*linear_attn.*", True: "re:.*linear_attn.in_proj_[ab]$"}
MAX_LENGTH = 512


def single(batch: list[dict[str, list]]) -> dict[str, torch.Tensor]:
    """A batch is one sample: nothing is padded."""
    assert len(batch) == 1
    return {key: torch.tensor(value) for key, value in batch[0].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--gdn", action="store_true", help="quantize in_proj_qkv, in_proj_z and out_proj of linear_attn too")
    options = parser.parse_args()
    token_lists = json.loads(options.tokens.read_text(encoding="utf-8"))
    with load_context(Qwen3_5ForConditionalGeneration):
        model = Qwen3_5ForConditionalGeneration.from_pretrained(options.source, local_files_only=True)
    processor = AutoProcessor.from_pretrained(options.source, local_files_only=True)
    oneshot(
        model=model,
        recipe=QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=[*KEPT, KEPT_OF_GDN[options.gdn]]),
        dataset=Dataset.from_list([{"input_ids": [ids], "attention_mask": [[1] * len(ids)]} for ids in token_lists]),
        max_seq_length=MAX_LENGTH,
        num_calibration_samples=len(token_lists),
        data_collator=single,
    )
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)


if __name__ == "__main__":
    main()
