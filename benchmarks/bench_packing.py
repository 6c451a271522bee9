"""Packing one BF16 matrix to NVFP4: the compiled kernel, PyTorch eager and compiled, and the real modelopt, in one run.

    python benchmarks/bench_packing.py [--rows 17408] [--columns 5120] [--repeats 7] [--ways NAME …] [--json FILE]

Out: a table and JSON. Seconds are the median of calls that alternate between the ways, each in a process of its own that
is kept; first: the first call, with whatever that compiles; extra memory: the largest rise of resident memory in a call
over the matrix's bytes, outputs included. All ways must give the same bits. "copy" reads and writes the matrix once, no more.
"""

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# name → (threads, what it is)
WAYS = {
    "modelopt": (2, "NVFP4QTensor.quantize, as modelopt 0.47 exports"),
    "eager": (2, "the definition in PyTorch, pieces of rows"),
    "torch.compile": (2, "the definition compiled, the matrix at once"),
    "kernel-1": (1, "the compiled kernel"),
    "kernel-2": (2, "the compiled kernel"),
    "copy": (2, "torch's copy of the BF16 matrix"),
}
Packing = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]


def packing(way: str) -> Packing:
    """weight, scale_2 → (codes, block scales) by that way; only modelopt's environment has modelopt."""
    if way == "modelopt":
        from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor  # type: ignore[import-not-found]

        def export(weight: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scales, _ = NVFP4QTensor.get_weights_scaling_factor(weight, 16, scale_2)
            tensor, _, _ = NVFP4QTensor.quantize(weight, 16, scales, scale_2)
            return tensor._quantized_data, scales

        return export
    if way == "copy":
        return lambda weight, scale_2: (weight.clone(),)

    from mtpress.formats import nvfp4

    if way == "torch.compile":

        def definition(weight: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scales = nvfp4.block_scales(weight, scale_2)
            step = (scales.float() * scale_2).unsqueeze(-1)
            scaled = weight.view(*scales.shape, nvfp4.GROUP_SIZE) / step
            return nvfp4.pack(nvfp4.encode(scaled.view(weight.shape))), scales

        return torch.compile(definition)
    by = nvfp4.EAGER if way == "eager" else nvfp4.kernel()
    return lambda weight, scale_2: nvfp4.quantize(weight, scale_2, by)


def make_weight(rows: int, columns: int) -> torch.Tensor:
    """BF16 normal numbers, the same in every process, made in pieces so that they leave no memory behind."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    for row in weight.split(256):
        row.copy_(torch.randn(row.shape, generator=generator) * 0.02)
    return weight


def resident(field: str) -> int:
    """Bytes of resident memory of this process: VmRSS now, or VmHWM, the peak since `forget_peak`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def serve(way: str, rows: int, columns: int) -> None:
    """Answers each line on stdin with one packing: a line of JSON with its seconds, memory and the digest of its bits."""
    torch.set_num_threads(WAYS[way][0])
    weight = make_weight(rows, columns)
    scale_2 = weight.abs().max().float() / (6 * 448)
    pack = packing(way)
    print("ready", flush=True)
    for _ in sys.stdin:
        before = resident("VmRSS")
        forget_peak()
        started = time.perf_counter()
        outputs = pack(weight, scale_2)
        seconds = time.perf_counter() - started
        extra = (resident("VmHWM") - before) / (weight.numel() * weight.element_size())
        digest = hashlib.sha256()
        for output in outputs:
            digest.update(output.view(torch.uint8).numpy().data)
        del outputs
        print(json.dumps({"seconds": seconds, "extra": extra, "sha256": digest.hexdigest()}), flush=True)


def start(way: str, options: argparse.Namespace, scratch: str) -> "subprocess.Popen[str]":
    python = sys.executable
    if way == "modelopt":
        made = subprocess.run([sys.executable, str(ROOT / "locks" / "make_env.py"), "modelopt"], check=True, capture_output=True, text=True)
        python = made.stdout.split()[-1]
    command = [python, __file__, "--serve", way, "--rows", str(options.rows), "--columns", str(options.columns)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": scratch}  # empty: the cost of compiling is seen
    log = (Path(scratch) / f"{way}.log").open("w")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


def ask(way: str, process: "subprocess.Popen[str]", scratch: str, question: str) -> str:
    """The process's next line of answer that is not a library's chatter."""
    assert process.stdin and process.stdout
    process.stdin.write(question)
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith(("ready", "{")):
            return line
    raise SystemExit(f"{way} ended:\n{(Path(scratch) / f'{way}.log').read_text()[-2000:]}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        processes = {}
        try:
            for way in options.ways:
                processes[way] = start(way, options, scratch)
                ask(way, processes[way], scratch, "")
            calls: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
            for _ in range(options.repeats + 1):
                for way, process in processes.items():
                    calls[way].append(json.loads(ask(way, process, scratch, "\n")))
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    results = {}
    for way, (first, *later) in calls.items():
        results[way] = {
            "threads": WAYS[way][0],
            "seconds": statistics.median(call["seconds"] for call in later),
            "seconds_fastest": min(call["seconds"] for call in later),
            "seconds_all": [round(call["seconds"], 4) for call in later],
            "first_seconds": first["seconds"],
            "extra_memory": max(call["extra"] for call in (first, *later)),
        }
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "matrix": [options.rows, options.columns],
        "same_bits": len({call["sha256"] for way in calls if way != "copy" for call in calls[way]}) == 1,
        "ways": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=17408)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path, default=Path("build/bench_packing.json"))
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.rows, options.columns)
        return
    found = measure(options)
    slowest = max(way["seconds"] for way in found["ways"].values())
    print(f"{options.rows} x {options.columns} BF16, {found['machine']}; same bits: {found['same_bits']}")
    print(f"{'way':<14} {'threads':>7} {'ms':>8} {'fastest':>8} {'speed-up':>9} {'first s':>8} {'extra memory':>13}")
    for name, way in found["ways"].items():
        times = f"{1e3 * way['seconds']:>8.1f} {1e3 * way['seconds_fastest']:>8.1f} {slowest / way['seconds']:>9.1f}"
        print(f"{name:<14} {way['threads']:>7} {times} {way['first_seconds']:>8.2f} {way['extra_memory']:>13.3f}  {WAYS[name][1]}")
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
