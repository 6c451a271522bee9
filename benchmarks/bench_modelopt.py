"""mtpress against the real modelopt, end to end on the same full-width checkpoint and the same tokens.

    python benchmarks/bench_modelopt.py [--layers 4] [--samples 4] [--tokens 512] [--json FILE]

Out: a table and JSON: seconds of the forward and of everything else (imports, loading, statistics, packing, writing), and
the peak resident memory of each process. modelopt runs in .envs/modelopt. It does not write the draft head; mtpress does.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from full_size import WIDTHS, make_full_size
from measuring import measured, mtpress, options, record, table, write_calibration, write_json, write_recipe
from mtpress.calibration.samples import load_calibration
from mtpress.plan.recipe import load_recipe
from mtpress.progress import human_bytes

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = options(__doc__ or "", "bench_modelopt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    chosen = parser.parse_args()
    python = subprocess.run(
        [sys.executable, ROOT / "locks/make_env.py", "modelopt"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()[-1]  # fmt: skip
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        here = Path(scratch)
        make_full_size(here / "source", layers=chosen.layers, width=replace(WIDTHS["27b"], vocab_size=1024, vision_depth=1), silent=False)
        lines = write_calibration(here / "lines.jsonl", chosen.samples, chosen.tokens)
        recipe = write_recipe(here / "recipe.yaml", "nvfp4-mtp-vlm", chosen.samples, chosen.tokens)
        samples = load_calibration(here / "source", load_recipe(recipe).calibration, [str(lines)]).samples
        (here / "tokens.json").write_text(json.dumps([sample.input_ids.tolist() for sample in samples]), encoding="utf-8")
        ours = mtpress("quantize", here / "source", here / "ours", "--recipe", recipe, "--calibration", lines)
        made = record(here / "ours")
        command = [
            python,
            str(ROOT / "benchmarks/modelopt_timed.py"),
            str(here / "source"),
            str(here / "theirs"),
            str(here / "tokens.json"),
        ]
        theirs = measured(command)
        parts = json.loads(theirs.stdout.splitlines()[-1])
    forward = {"mtpress": made["seconds"]["forward"], "modelopt": parts["forward"]}
    rest = {"mtpress": ours.seconds - forward["mtpress"], "modelopt": theirs.seconds - forward["modelopt"]}
    memory = {"mtpress": ours.peak_bytes, "modelopt": theirs.peak_bytes}
    rows = [(who, forward[who], rest[who], human_bytes(memory[who])) for who in forward]
    rows.append(("modelopt / mtpress", *(float(d["modelopt"] / d["mtpress"]) for d in (forward, rest, memory))))
    table(["", "forward s", "everything else s", "peak memory"], rows)
    print("modelopt's parts:", ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items()))
    write_json(
        chosen.json,
        {
            "layers": chosen.layers, "samples": chosen.samples, "tokens": chosen.tokens, "forward_seconds": forward, "rest_seconds": rest,
            "peak_bytes": memory, "modelopt_parts": parts, "mtpress_seconds": made["seconds"],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
