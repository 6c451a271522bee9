"""A run spread over processes and over a local Ray cluster, against one process: speed-up, memory, and the same bytes.

    python benchmarks/bench_workers.py [--layers 2] [--samples 8] [--tokens 512] [--no-ray] [--json FILE]

Out: a table and JSON. One process with one thread is what two workers with a thread each are held against; one process with
two threads shows what the second process adds on a machine of two cores. The weight-only rows write two shards.
"""

import hashlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from full_size import WIDTHS, make_full_size
from measuring import Run, mtpress, options, record, table, write_calibration, write_json, write_recipe
from mtpress.progress import human_bytes

WAYS: dict[str, tuple[tuple[str, ...], int]] = {
    "1 process, 1 thread": ((), 1),
    "1 process, 2 threads": ((), 2),
    "2 processes, 1 thread each": (("--workers", "2"), 2),
    "2 Ray actors, 1 thread each": (("--workers", "2", "--ray", "local"), 2),
}


def weights_sha256(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.glob("*.safetensors"))}


def main() -> None:
    parser = options(__doc__ or "", "bench_workers")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--no-ray", action="store_true")
    chosen = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    rows: list[tuple[Any, ...]] = []
    found: dict[str, Any] = {"layers": chosen.layers, "samples": chosen.samples, "tokens": chosen.tokens}
    ways = {way: call for way, call in WAYS.items() if not (chosen.no_ray and "Ray" in way)}
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        here = Path(scratch)
        lines = write_calibration(here / "lines.jsonl", chosen.samples, chosen.tokens)
        recipe = write_recipe(here / "recipe.yaml", "nvfp4-mtp-vlm", chosen.samples, chosen.tokens)
        narrow = replace(WIDTHS["27b"], vocab_size=1024, vision_depth=1)
        for kind, width, layers, arguments in (
            ("calibrated", narrow, chosen.layers, ("--recipe", recipe, "--calibration", lines)),
            ("weight-only", WIDTHS["27b"], chosen.layers, ("--recipe", "nvfp4-mtp-vlm", "--weight-only", "0.01")),
        ):
            source = here / kind
            make_full_size(source, layers=layers, width=width, silent=False)
            bytes_before: dict[str, str] | None = None
            base: Run | None = None
            for way, (extra, threads) in ways.items():
                run = mtpress("quantize", source, here / "out", *arguments, *extra, threads=threads)
                made, digests = record(here / "out"), weights_sha256(here / "out")
                shutil.rmtree(here / "out")
                assert bytes_before in (None, digests), f"{way}: other bytes"
                bytes_before, base = digests, base or run
                rows.append((kind, way, run.seconds, base.seconds / run.seconds, made["seconds"]["forward"], human_bytes(run.peak_bytes)))
                found.setdefault(kind, {})[way] = {
                    "seconds": run.seconds,
                    "forward": made["seconds"]["forward"],
                    "peak_bytes": run.peak_bytes,
                }
            shutil.rmtree(source)
    table(["run", "spread over", "seconds", "speed-up", "forward s", "peak memory, all"], rows)
    print("every way wrote the same weights, byte for byte")
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
