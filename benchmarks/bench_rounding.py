"""Every choice of NVFP4's scales at full width: what it costs beside "max", and what it leaves of the error.

    python benchmarks/bench_rounding.py [--choices max sweep …] [--repeats 5] [--json FILE]         one matrix
    python benchmarks/bench_rounding.py --runs [--rounds 3] [--layers 4] [--samples 8] [--tokens 1024]   whole runs

Out: tables and JSON. One matrix of 17408×5120: seconds of the choice (scales and codes, one thread's processor time; the least of
calls that alternate between the choices) and peak memory beside the matrix. Whole runs of full-width layers, vocabulary and vision
tower small, the choices in turn in each round: medians of the seconds, their ratio to the first choice's of the same round, the part
that chooses, the forward with its sums, peak memory of the process, and preflight's promises.
"""

import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench_packing import forget_peak, make_weight, resident
from full_size import WIDTHS, make_full_size
from measuring import mtpress, options, record, table, write_calibration, write_json
from mtpress.progress import human_bytes

CHOICES = ("max", "four-over-six", "sweep", "hessian")
BY_SAMPLES = ("hessian", "gptq")
HASH_BYTES = 32 << 20


def one_matrix(choices: list[str], repeats: int) -> dict[str, dict[str, float]]:
    import hashlib

    from mtpress.quantization.rounders import ROUNDINGS

    torch.set_num_threads(1)
    weight = make_weight(17408, 5120)
    found: dict[str, dict[str, float]] = {choice: {"seconds": float("inf"), "extra_memory": 0.0} for choice in choices}
    for _ in range(repeats):
        for choice in choices:
            before = resident("VmRSS")
            forget_peak()
            started = time.thread_time()
            ROUNDINGS["nvfp4"][choice].matrix(weight)
            spent = time.thread_time() - started
            found[choice]["seconds"] = min(found[choice]["seconds"], spent)
            found[choice]["extra_memory"] = max(found[choice]["extra_memory"], (resident("VmHWM") - before) / weight.nbytes)
    data = memoryview(weight.view(torch.uint8).view(-1)[:HASH_BYTES].numpy())
    spans = []
    for _ in range(repeats):
        started = time.thread_time()
        hashlib.sha256(data)
        spans.append(time.thread_time() - started)
    hashed = min(spans) / HASH_BYTES * weight.nbytes * (1 + 9 / 32)  # the matrix, and what it becomes
    for costs in found.values():
        costs["hash_seconds"] = hashed
    return found


def whole_runs(
    choices: list[str], rounds: int, layers: int, samples: int, tokens: int, calibrated: bool
) -> list[dict[str, dict[str, Any]]]:
    """Of each round, choice → its run."""
    import yaml

    from mtpress.plan.recipe import load_recipe

    found: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        source = Path(scratch) / "source"
        make_full_size(source, layers=layers, width=replace(WIDTHS["27b"], vocab_size=1024, vision_depth=1), silent=False)
        lines = write_calibration(Path(scratch) / "lines.jsonl", samples, tokens)
        for number in range(rounds):
            found.append({})
            for choice in choices:
                content = load_recipe("nvfp4-mtp-vlm").canonical() | {"rounding": choice}
                content["calibration"] |= {"num_samples": samples, "max_seq_len": tokens}
                recipe, out = Path(scratch) / f"{choice}.yaml", Path(scratch) / "out"
                recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
                run = mtpress(
                    "quantize", source, out, "--recipe", recipe, *(("--calibration", lines) if calibrated else ("--weight-only", 0.01))
                )
                made = record(out)
                shutil.rmtree(out)
                found[-1][choice] = {"seconds": run.seconds, "peak_bytes": run.peak_bytes, "spent": made["seconds"], **made["preflight"]}
                print(f"round {number + 1}, {choice}: {run.seconds:.1f} s, {human_bytes(run.peak_bytes)}", flush=True)
    return found


def runs_table(found: list[dict[str, dict[str, Any]]]) -> None:
    first = next(iter(found[0]))
    rows = []
    for choice in found[0]:
        runs = [one[choice] for one in found]
        ratios = sorted(one[choice]["seconds"] / one[first]["seconds"] for one in found)
        middle = {part: median(run["spent"][part] for run in runs) for part in ("forward", "round")}
        promised = median(run["promised"]["seconds"] for run in runs), max(run["promised"]["memory_bytes"] for run in runs)
        rows.append(
            (choice, f"{median(run['seconds'] for run in runs):.1f}", f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]",
             f"{middle['forward']:.1f}", f"{middle['round']:.1f}", human_bytes(max(run["peak_bytes"] for run in runs)),
             f"{promised[0]:.0f} s, {human_bytes(promised[1])}")
        )  # fmt: skip
    table(["choice", "seconds", f"× {first}", "of them forward and sums", "choosing", "peak memory", "promised"], rows)


def main() -> None:
    parser = options(__doc__ or "", "bench_rounding")
    parser.add_argument("--choices", nargs="+", choices=(*CHOICES, "gptq"), default=list(CHOICES), help="gptq: of --runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", action="store_true", help="whole runs in place of one matrix")
    parser.add_argument("--rounds", type=int, default=1, help="of --runs")
    parser.add_argument("--weight-only", action="store_true", help="of --runs: without samples, so without hessian")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    chosen = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    if not chosen.runs:
        costs = one_matrix(chosen.choices, chosen.repeats)
        first = costs[chosen.choices[0]]
        rows = [
            (name, f"{1e3 * c['seconds']:.0f}", f"{c['seconds'] / first['seconds']:.2f}",
             f"{(c['seconds'] + c['hash_seconds']) / (first['seconds'] + first['hash_seconds']):.2f}", f"{c['extra_memory']:.2f}")
            for name, c in costs.items()
        ]  # fmt: skip
        table(["choice", "ms", f"× {chosen.choices[0]}", "× with SHA-256, as in a run", "extra memory / matrix"], rows)
        write_json(chosen.json, {"matrix": costs})
        return
    choices = [choice for choice in chosen.choices if choice not in BY_SAMPLES or not chosen.weight_only]
    runs = whole_runs(choices, chosen.rounds, chosen.layers, chosen.samples, chosen.tokens, not chosen.weight_only)
    runs_table(runs)
    write_json(chosen.json, {"runs": runs, "layers": chosen.layers, "samples": chosen.samples, "tokens": chosen.tokens})


if __name__ == "__main__":
    main()
