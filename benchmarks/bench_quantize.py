"""Weight-only NVFP4 of a full-width checkpoint against plainly reading its bytes and writing the output's, in one run.

    python benchmarks/bench_quantize.py [--layers 4] [--json FILE]

Out: a table and JSON: seconds, the ratio, peak memory of the quantizing process; and inspect on the headers of all 64 layers.
Caches are as the system leaves them, for both sides alike.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from full_size import WIDTHS, make_full_size
from mtpress.checkpoint import Checkpoint
from mtpress.progress import human_bytes

PIECE = 16 << 20
RECIPE = "nvfp4-mtp-vlm"


def plain_copy(source: Path, out: Path, out_bytes: int) -> float:
    """Seconds to read every shard and to write as many bytes as the output has."""
    started = time.perf_counter()
    buffer = bytearray(PIECE)
    for shard in sorted(source.glob("*.safetensors")):
        with shard.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with out.open("wb", buffering=0) as file:
        for _ in range(out_bytes // PIECE):
            file.write(buffer)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    out.unlink()
    return seconds


def timed(arguments: list[str]) -> tuple[float, int]:
    """(seconds, peak memory in bytes) of one mtpress command in a process of its own."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mtpress", *arguments, "--json"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def measure(layers: int) -> dict[str, Any]:
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        headers, source, out = (Path(scratch) / name for name in ("headers", "source", "out"))
        make_full_size(headers, layers=64, sparse=True, silent=True)
        inspect_seconds, _ = timed(["inspect", str(headers)])
        make_full_size(source, layers=layers, width=replace(WIDTHS["27b"], vocab_size=1024, vision_depth=1), silent=False)
        quantize_seconds, peak = timed(["quantize", str(source), str(out), "--recipe", RECIPE, "--weight-only", "0.01"])
        sizes = Checkpoint.open(source).num_bytes, Checkpoint.open(out).num_bytes
        copy_seconds = plain_copy(source, Path(scratch) / "copy", sizes[1])
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "layers": layers,
        "source_bytes": sizes[0],
        "output_bytes": sizes[1],
        "copy_seconds": copy_seconds,
        "quantize_seconds": quantize_seconds,
        "ratio": quantize_seconds / copy_seconds,
        "peak_memory_bytes": peak,
        "inspect_27b_seconds": inspect_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("build/bench_quantize.json"))
    options = parser.parse_args()
    found = measure(options.layers)
    for key, value in found.items():
        print(f"{key:<22} {human_bytes(value) if key.endswith('_bytes') else f'{value:.2f}' if isinstance(value, float) else value}")
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
