"""The chunked gated delta rule against transformers' PyTorch fallback, on the heads of Qwen3.6-27B, turn by turn in one run.

    python benchmarks/bench_gated_delta_rule.py [--tokens 512 1024 4096 8192] [--rounds 3] [--json FILE]

Out: a table and JSON: seconds of each rule (the fastest round), their ratio, what memory each takes beyond its inputs at its
peak, and the rule's seconds as a share of the same layer's BF16 matrix products, which are timed in the same run.
Inputs lie as the layer's convolution leaves them; the fallback gets keys repeated for every value head, as the layer gives
them, and the time of the repeating counts as its own.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from mtpress.models.gated_delta_rule import chunk_gated_delta_rule
from mtpress.progress import human_bytes
from qwen3_6_files import Width

WIDTH = Width()
NUM_KEYS, NUM_VALUES = WIDTH.linear_num_key_heads, WIDTH.linear_num_value_heads
KEY_WIDTH = NUM_KEYS * WIDTH.linear_key_head_dim
VALUE_WIDTH = NUM_VALUES * WIDTH.linear_value_head_dim


def inputs(num_tokens: int) -> dict[str, Tensor]:
    widths = [KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH]
    mixed = torch.randn(1, sum(widths), num_tokens, dtype=torch.bfloat16).transpose(1, 2)
    parts = zip(mixed.split(widths, 2), (NUM_KEYS, NUM_KEYS, NUM_VALUES), strict=True)
    query, key, value = (x.reshape(1, num_tokens, heads, -1) for x, heads in parts)
    g = -torch.rand(1, num_tokens, NUM_VALUES) * torch.logspace(-5, 1.3, NUM_VALUES)
    return {"query": query, "key": key, "value": value, "g": g, "beta": torch.rand(1, num_tokens, NUM_VALUES).bfloat16()}


def mtpress_rule(x: dict[str, Tensor]) -> Tensor:
    return chunk_gated_delta_rule(**x, use_qk_l2norm_in_kernel=True)[0]


def transformers_rule(x: dict[str, Tensor]) -> Tensor:
    repeated = {name: x[name].repeat_interleave(NUM_VALUES // NUM_KEYS, 2) for name in ("query", "key")}
    return torch_chunk_gated_delta_rule(**{**x, **repeated}, use_qk_l2norm_in_kernel=True)[0]  # type: ignore[no-any-return]


RULES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {"mtpress": mtpress_rule, "transformers": transformers_rule}


def layer_products(num_tokens: int) -> Callable[[], None]:
    """The matrix products of one linear-attention layer, MLP included."""
    hidden, inner = WIDTH.hidden_size, WIDTH.intermediate_size
    shapes = [(2 * KEY_WIDTH + VALUE_WIDTH, hidden), (VALUE_WIDTH, hidden), (NUM_VALUES, hidden), (NUM_VALUES, hidden)]
    shapes += [(hidden, VALUE_WIDTH), (inner, hidden), (inner, hidden), (hidden, inner)]
    weights = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    states = {k: torch.randn(num_tokens, k, dtype=torch.bfloat16) for k in {shape[1] for shape in shapes}}

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(states[weight.shape[1]], weight)

    return run


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def extra_memory(rule: str, num_tokens: int) -> int:
    """Bytes that one call adds to the peak of a process of its own, its output included."""
    command = [sys.executable, __file__, "--one-call", rule, "--tokens", str(num_tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def one_call(rule: str, num_tokens: int) -> int:
    RULES[rule](inputs(64))  # what torch and its libraries allocate once is no part of it
    x = inputs(num_tokens)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten (Linux only)
    before = peak_bytes()
    RULES[rule](x)
    return peak_bytes() - before


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(num_tokens: int, rounds: int) -> dict[str, Any]:
    x, products = inputs(num_tokens), layer_products(num_tokens)
    turns: dict[str, Callable[[], object]] = {name: partial(rule, x) for name, rule in RULES.items()}
    turns["products"] = products
    best = dict.fromkeys(turns, float("inf"))
    for _ in range(rounds + 1):
        for name, run in turns.items():
            best[name] = min(best[name], seconds(run))
    found: dict[str, Any] = {"tokens": num_tokens, "layer_products_seconds": best["products"]}
    for name in RULES:
        found[f"{name}_seconds"] = best[name]
        found[f"{name}_share_of_products"] = best[name] / best["products"]
        found[f"{name}_extra_bytes"] = extra_memory(name, num_tokens)
    found["speedup"] = best["transformers"] / best["mtpress"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("build/bench_gated_delta_rule.json"))
    parser.add_argument("--one-call", choices=RULES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if options.one_call:
        print(one_call(options.one_call, options.tokens[0]))
        return
    found = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", "lengths": []}
    print(f"{'tokens':>7} {'transformers':>13} {'mtpress':>9} {'times':>6} {'of products':>12} {'extra memory':>26}")
    for num_tokens in options.tokens:
        row = measure(num_tokens, options.rounds)
        found["lengths"].append(row)
        memory = f"{human_bytes(row['transformers_extra_bytes'])} → {human_bytes(row['mtpress_extra_bytes'])}"
        share = f"{row['transformers_share_of_products']:.1%} → {row['mtpress_share_of_products']:.1%}"
        print(
            f"{num_tokens:>7} {row['transformers_seconds']:>12.3f}s {row['mtpress_seconds']:>8.3f}s {row['speedup']:>6.1f} "
            f"{share:>14} {memory:>24}",
            flush=True,
        )
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
