"""Calibrated passes over full-width checkpoints of several depths: time, memory, and what 64 layers would take.

    python benchmarks/bench_calibrated.py [--layers 4 8 16] [--samples 16] [--tokens 1024] [--json FILE]

Out: a table and JSON: seconds and peak memory of each depth with preflight's promise beside them, the straight line through
the times with its R², the spread of the memory, and the projection to the 64 layers of Qwen3.6-27B. Vocabulary and vision
tower are small: neither passes through the forward.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from full_size import WIDTHS, make_full_size
from measuring import mtpress, options, record, table, write_calibration, write_json, write_recipe
from mtpress.progress import human_bytes, human_seconds

KEPT_BYTES = 2 * 2_542_796_800 + 921_000_000  # embeddings, lm_head and vision tower of the 27B model, which are copied


def main() -> None:
    parser = options(__doc__ or "", "bench_calibrated")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    chosen = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    depths = []
    for layers in chosen.layers:
        with tempfile.TemporaryDirectory(dir="build") as scratch:
            source, out = Path(scratch) / "source", Path(scratch) / "out"
            make_full_size(source, layers=layers, width=replace(WIDTHS["27b"], vocab_size=1024, vision_depth=1), silent=False)
            lines = write_calibration(Path(scratch) / "lines.jsonl", chosen.samples, chosen.tokens)
            recipe = write_recipe(Path(scratch) / "recipe.yaml", "nvfp4-mtp-vlm", chosen.samples, chosen.tokens)
            run = mtpress("quantize", source, out, "--recipe", recipe, "--calibration", lines)
            made = record(out)
            depths.append(
                {"layers": layers, "seconds": run.seconds, "peak_bytes": run.peak_bytes, **made["preflight"], "spent": made["seconds"]}
            )
            print(f"{layers} layers: {run.seconds:.1f} s, {human_bytes(run.peak_bytes)}", flush=True)
    count, seconds = np.array(chosen.layers, float), np.array([d["seconds"] for d in depths])
    slope, start = np.polyfit(count, seconds, 1)
    left = seconds - (start + slope * count)
    r_squared = 1 - float((left**2).sum() / ((seconds - seconds.mean()) ** 2).sum()) if len(depths) > 2 else None
    peaks = [d["peak_bytes"] for d in depths]
    projected = start + 64 * slope
    table(
        ["layers", "seconds", "promised", "forward s", "peak memory", "promised"],
        [
            (d["layers"], d["seconds"], d["promised"]["seconds"], d["spent"]["forward"], human_bytes(d["peak_bytes"]),
             human_bytes(d["promised"]["memory_bytes"]))
            for d in depths
        ],
    )  # fmt: skip
    fit = "needs three depths" if r_squared is None else f"{r_squared:.5f}"
    print(f"seconds = {start:.1f} + {slope:.2f} · layers, R² {fit}; memory spread {max(peaks) / min(peaks) - 1:.1%}")
    print(f"64 layers, {chosen.samples * chosen.tokens} tokens: {start:.1f} + 64 · {slope:.2f} = {human_seconds(projected)}")
    print(f"(and {human_bytes(KEPT_BYTES)} more to copy: embeddings, lm_head, vision tower; written while the forward runs)")
    write_json(
        chosen.json,
        {
            "samples": chosen.samples, "tokens": chosen.tokens, "depths": depths, "slope_seconds": slope, "start_seconds": start,
            "r_squared": r_squared, "memory_spread": max(peaks) / min(peaks) - 1, "projected_64_layers_seconds": projected,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
