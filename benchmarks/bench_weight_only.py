"""Weight-only passes over a full-width checkpoint against plainly reading its bytes and writing the output's, cold caches.

    python benchmarks/bench_weight_only.py [--layers 16] [--rounds 2] [--source DIR] [--json FILE]

Out: a table and JSON: seconds of each way in turn (fastest of the rounds), ratios, peak memory of the quantizing processes: NVFP4,
INT4 with searched scales, INT4 by plain rounding; and inspect on the headers of all 64 layers. "plain" reads and writes as cp does,
through the page cache, with an fsync at the end; "plain, direct" goes past the page cache, as mtpress does.
"""

import mmap
import os
import shutil
import tempfile
import time
from pathlib import Path

from full_size import make_full_size
from measuring import make_cold, mtpress, options, record, table, write_json
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.plan.recipe import recipe_file
from mtpress.progress import human_bytes

PIECE = 16 << 20


def plain(source: Path, out: Path, out_bytes: int, flags: int) -> float:
    """Seconds to read every shard and then to write as many bytes as the output has."""
    make_cold(source)
    buffer = mmap.mmap(-1, PIECE)
    started = time.perf_counter()
    for shard in sorted(source.glob("*.safetensors")):
        file = os.open(shard, os.O_RDONLY | flags)
        position = 0
        while count := os.preadv(file, [buffer], position):
            position += count
        os.close(file)
    file = os.open(out, os.O_WRONLY | os.O_CREAT | flags)
    for _ in range(out_bytes // PIECE):
        os.write(file, buffer)
    os.fsync(file)
    os.close(file)
    seconds = time.perf_counter() - started
    out.unlink()
    return seconds


def main() -> None:
    parser = options(__doc__ or "", "bench_weight_only")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--source", type=Path, help="a BF16 checkpoint to use in place of a generated one")
    chosen = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        headers, out, copy = (Path(scratch) / name for name in ("headers", "out", "copy"))
        make_full_size(headers, layers=64, sparse=True, silent=True)
        inspect_seconds = mtpress("inspect", headers).seconds
        source = chosen.source or Path(scratch) / "source"
        if chosen.source is None:
            make_full_size(source, layers=chosen.layers, silent=False)
        search = Path(scratch) / "int4-search.yaml"
        search.write_text(recipe_file("int4-mtp-vlm").read_text().replace("rounding: rtn", "rounding: search"))
        # NVFP4 last: the plain ways write as much as it does
        ways = {"INT4, rtn": ["int4-mtp-vlm"], "INT4, search": [search], "mtpress": ["nvfp4-mtp-vlm", "--weight-only", "0.01"]}
        peaks: dict[str, int] = {}
        spent: dict[str, list[float]] = {way: [] for way in (*ways, "plain", "plain, direct")}
        for _ in range(chosen.rounds):
            for way, recipe in ways.items():
                make_cold(source)
                run = mtpress("quantize", source, out, "--recipe", *recipe)
                spent[way].append(run.seconds)
                peaks[way] = max(run.peak_bytes, peaks.get(way, 0))
                made, sizes = record(out), (Checkpoint.open(source).num_bytes, Checkpoint.open(out).num_bytes)
                shutil.rmtree(out)
            spent["plain"].append(plain(source, copy, sizes[1], 0))
            spent["plain, direct"].append(plain(source, copy, sizes[1], os.O_DIRECT))
    best = {way: min(seconds) for way, seconds in spent.items()}
    found = {
        "layers": chosen.layers, "source_bytes": sizes[0], "output_bytes": sizes[1], "seconds": spent,
        "ratio_to_plain": best["mtpress"] / best["plain"], "ratio_to_plain_direct": best["mtpress"] / best["plain, direct"],
        "ratio_to_nvfp4": {way: best[way] / best["mtpress"] for way in ways}, "peak_memory_bytes": peaks["mtpress"],
        "peak_memory_bytes_by_way": peaks, "preflight": made["preflight"], "inspect_27b_seconds": inspect_seconds,
    }  # fmt: skip
    print(f"{human_bytes(sizes[0])} read, {human_bytes(sizes[1])} written, {chosen.layers} layers")
    rows = [
        (
            way,
            best[way],
            best["mtpress"] / best[way],
            human_bytes(peaks[way]) if way in peaks else "",
            " ".join(f"{s:.1f}" for s in seconds),
        )
        for way, seconds in spent.items()
    ]
    table(["way", "seconds", "mtpress / way", "peak memory", "rounds"], rows)
    print(f"inspect of 64 layers {inspect_seconds:.2f} s")
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
