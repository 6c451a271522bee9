"""`mtpress eval` at full width: its time and memory beside those of the run that made the checkpoint.

    python benchmarks/bench_eval.py [--layers 4] [--documents 2] [--tokens 512] [--json FILE]

Random weights of the 27B model's width, its whole vocabulary of 248,320 and its draft head, a vision tower of one layer. Quantized to
NVFP4, then measured against its source on that many documents of that many tokens. Out: a table and JSON: seconds, and peak memory of
each process. Random weights say nothing of KL.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from full_size import WIDTHS, make_full_size
from measuring import mtpress, options, table, write_calibration, write_json, write_recipe
from mtpress.progress import human_bytes


def main() -> None:
    parser = options(__doc__ or "", "bench_eval")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    chosen = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        make_full_size(source, layers=chosen.layers, width=replace(WIDTHS["27b"], vision_depth=1), silent=False)
        lines = write_calibration(Path(scratch) / "lines.jsonl", chosen.documents, chosen.tokens)
        recipe = write_recipe(Path(scratch) / "recipe.yaml", "nvfp4-mtp-vlm", chosen.documents, chosen.tokens)
        size = ["--max-seq-len", str(chosen.tokens), "--resamples", "10"]
        runs = {
            "quantize": mtpress("quantize", source, out, "--recipe", recipe, "--calibration", lines),
            "eval": mtpress("eval", out, "--base", source, "--data", lines, *size),
        }
    table(["", "seconds", "peak memory"], [(name, f"{run.seconds:.1f}", human_bytes(run.peak_bytes)) for name, run in runs.items()])
    found = {name: {"seconds": run.seconds, "peak_bytes": run.peak_bytes} for name, run in runs.items()}
    write_json(chosen.json, {"runs": found, "layers": chosen.layers, "documents": chosen.documents, "tokens": chosen.tokens})


if __name__ == "__main__":
    main()
