"""The whole 27B shape on a GPU, in one command: time, GPU memory, and how near the run comes to the copy and matmul limits.

    python benchmarks/gpu_full_size.py [--dir build] [--layers 64] [--samples 20] [--tokens 8192] [--keep] [--json FILE]

Writes a 55.6 GB random-weight checkpoint (and 20.6 GB of output) under --dir, measures the rates of pinned copies and of BF16
products on this GPU, quantizes, and removes both. Out: a table and JSON. With --device cpu and small sizes it shows that the
script itself works, and nothing about a GPU.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from full_size import make_full_size
from measuring import options, record, table, write_calibration, write_json, write_recipe
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.models.qwen3_5.names import layer_index
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import load_recipe
from mtpress.progress import human_bytes
from mtpress.stages.quantize import quantize

COPY_BYTES = 1 << 30


def fastest(work: Any, device: torch.device, times: int = 5) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def limits(device: torch.device, tokens: int) -> dict[str, float]:
    """Bytes a second of pinned host memory → device, operations a second of a BF16 product of the MLP's shape."""
    on_gpu = device.type == "cuda"
    host = torch.empty(COPY_BYTES if on_gpu else 1 << 26, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.empty_like(host, device=device)
    x = torch.randn(min(tokens, 8192) if on_gpu else 64, 5120, dtype=torch.bfloat16, device=device)
    w = torch.randn(17408 if on_gpu else 512, 5120, dtype=torch.bfloat16, device=device)
    return {
        "copy_bytes_per_second": host.numel() / fastest(lambda: there.copy_(host, non_blocking=True), device),
        "matmul_flops": 2.0 * x.numel() * w.shape[0] / fastest(lambda: torch.nn.functional.linear(x, w), device),
    }


def main() -> int:
    parser = options(__doc__ or "", "gpu_full_size")
    parser.add_argument("--dir", type=Path, default=Path("build"))
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--width", default="27b")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for another run")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("gpu_full_size.py: torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    device = torch.device(chosen.device)
    here = chosen.dir / "gpu-full-size"
    here.mkdir(parents=True, exist_ok=True)
    source, out = here / "source", here / "out"
    if not source.exists():
        make_full_size(source, layers=chosen.layers, width=chosen.width, silent=False)
    if out.exists():
        shutil.rmtree(out)
    lines = write_calibration(here / "lines.jsonl", chosen.samples, chosen.tokens)
    recipe = write_recipe(here / "recipe.yaml", "nvfp4-mtp-vlm", chosen.samples, chosen.tokens)
    limit = limits(device, chosen.tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    quantize(source, out, recipe, calibration=[str(lines)], device=chosen.device)
    seconds = time.perf_counter() - started
    made = record(out)
    plan = make_plan(Checkpoint.open(source), load_recipe(recipe))
    layers = [info for step in plan.steps if step.layer is not None for job in step.jobs for info in job.sources]
    params = sum(info.num_params for info in layers if len(info.shape) == 2 and layer_index(info.name) is not None)
    flops, copied = 2.0 * params * made["calibration"]["num_tokens"], sum(info.num_bytes for info in layers)
    shares = {"copy": copied / limit["copy_bytes_per_second"] / seconds, "matmul": flops / limit["matmul_flops"] / seconds}
    found = {
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "layers": chosen.layers, "samples": chosen.samples, "tokens": chosen.tokens, "seconds": seconds, "spent": made["seconds"],
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0, "peak_bytes": made["peak_memory_bytes"],
        "limits": limit, "share_of_limits": shares,
    }  # fmt: skip
    table(
        ["", ""],
        [
            ("GPU", found["gpu"]), ("seconds", seconds), ("read / forward / round / write s", " / ".join(
                f"{made['seconds'][kind]:.1f}" for kind in ("read", "forward", "round", "write"))),
            ("GPU memory", human_bytes(float(found["gpu_peak_bytes"]))), ("host memory", human_bytes(made["peak_memory_bytes"])),
            ("pinned copy limit", f"{human_bytes(limit['copy_bytes_per_second'])}/s, {shares['copy']:.1%} of the time"),
            ("BF16 matmul limit", f"{limit['matmul_flops'] / 1e12:.1f} TFLOP/s, {shares['matmul']:.1%} of the time"),
        ],
    )  # fmt: skip
    write_json(chosen.json, found)
    if not chosen.keep:
        shutil.rmtree(here)
    return 0


if __name__ == "__main__":
    sys.exit(main())
