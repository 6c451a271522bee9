"""The real auto-round: every block of a text checkpoint tuned on given tokens, with the time of each iteration.

    .envs/autoround/bin/python benchmarks/autoround_timed.py SRC OUT TOKENS.json --iters 200 [--compile]

In: a BF16 Qwen3.5 checkpoint, a JSON list of token-id lists of one length. Out: in a new directory, the rounded linears as BF16 weights
under the names of the checkpoint, and one JSON line: for each block the clock at the start of its tuning and behind each iteration
(wall seconds, seconds of all its threads), and the losses. The settings are auto-round's own defaults (batches of 8, W4A16);
in_proj_a and in_proj_b stay in BF16, as mtpress leaves them. Runs on the packages of locks/autoround.txt and imports nothing of mtpress.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import auto_round.calib_dataset
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round import quantizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCKS: list[dict[str, Any]] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, its command's default from 10 iterations on")
    chosen = parser.parse_args()
    samples = torch.tensor(json.loads(chosen.tokens.read_text(encoding="utf-8")))
    chosen.out.mkdir()
    watch()
    # the samples as they are, where it would read and cut a data set of its own
    auto_round.calib_dataset.get_dataloader = lambda *_, **__: batches(samples, chosen.batch_size)
    model = AutoModelForCausalLM.from_pretrained(chosen.source, dtype=torch.bfloat16)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {name: {"bits": 16, "data_type": "float"} for name in names if re.search(r"in_proj_[ab]$|lm_head|mtp", name)}
    rounder = AutoRound(
        model, tokenizer=AutoTokenizer.from_pretrained(chosen.source), scheme="W4A16", iters=chosen.iters, nsamples=len(samples),
        seqlen=samples.shape[1], batch_size=chosen.batch_size, layer_config=kept, enable_torch_compile=chosen.compile, device_map="cpu",
    )  # fmt: skip
    model, _ = rounder.quantize()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and getattr(m, "scale", None) is not None}
    save_file({f"{name}.weight": linear.weight.detach().contiguous() for name, linear in linears.items()}, chosen.out / "all.safetensors")
    print(json.dumps({"blocks": BLOCKS, "linears": len(linears)}))


def now() -> tuple[float, float]:
    """Wall seconds, seconds of all threads; the latter stand still while other work has the cores."""
    return time.perf_counter(), time.process_time()


def batches(samples: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    return iter(samples.split(size))


def watch() -> None:
    """Notes when each block's tuning starts and ends, and each of its iterations."""
    tuning, stepping = quantizer.SignRoundQuantizer.quantize_block, quantizer.SignRoundQuantizer._step
    loss = quantizer.SignRoundQuantizer._get_loss

    def quantize_block(self: Any, *arguments: Any, **options: Any) -> Any:
        BLOCKS.append({"clock": [now()], "losses": []})
        return tuning(self, *arguments, **options)

    def step(self: Any, *arguments: Any, **options: Any) -> Any:
        stepping(self, *arguments, **options)
        BLOCKS[-1]["clock"].append(now())

    def get_loss(self: Any, *arguments: Any, **options: Any) -> Any:
        found = loss(self, *arguments, **options)
        BLOCKS[-1]["losses"].append(found.item())
        return found

    quantizer.SignRoundQuantizer.quantize_block = quantize_block
    quantizer.SignRoundQuantizer._step = step
    quantizer.SignRoundQuantizer._get_loss = get_loss


if __name__ == "__main__":
    main()
