"""mtpress's sign-gradient rounding of every block of a text checkpoint on given tokens, with the time of each iteration.

    python benchmarks/signround_timed.py SRC OUT TOKENS.json --iters 200

In and out as benchmarks/autoround_timed.py, which does the same with the real auto-round; the samples may be of different lengths, and
one iteration is plain rounding. Leaves out: writing a checkpoint.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mtpress.calibration import signround as signround_pass
from mtpress.calibration.signround import SignRoundPass
from mtpress.chat.sample import Sample
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import read_tensor
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import load_recipe
from mtpress.rounding.signround import Rounded, Settings

BLOCKS: list[dict[str, Any]] = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    chosen = parser.parse_args()
    samples = [Sample(torch.tensor(ids)) for ids in json.loads(chosen.tokens.read_text(encoding="utf-8"))]
    watch()
    plan = make_plan(Checkpoint.open(chosen.source), load_recipe("int4-autoround-mtp"))
    settings = Settings(iterations=chosen.iters, batch_size=chosen.batch_size)
    chosen.out.mkdir()
    with tempfile.TemporaryDirectory(dir=chosen.out) as directory:
        tuning = SignRoundPass(plan, samples, torch.device("cpu"), Path(directory), settings)
        for step in plan.steps:
            if step.layer is not None:
                found = tuning.layer(step, {info.name: read_tensor(info) for job in step.jobs for info in job.sources})
                for name, parts in found.items():
                    save_file({f"{name}.weight": dequantized(*parts)}, chosen.out / f"{name}.safetensors")
                del found
        tuning.close()
    print(json.dumps({"blocks": BLOCKS, "linears": len(list(chosen.out.glob("*.safetensors")))}))


def now() -> tuple[float, float]:
    """Wall seconds, seconds of all threads; the latter stand still while other work has the cores."""
    return time.perf_counter(), time.process_time()


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return Rounded(codes[:, ::2] | codes[:, 1::2] << 4, scales).dequantized()


def watch() -> None:
    """Notes when each block's tuning starts and ends, and each of its iterations."""
    tune, pieces, loss = signround_pass.tune, signround_pass._Block.pieces, signround_pass._Block.loss

    def timed(*arguments: Any, **options: Any) -> Any:
        BLOCKS.append({"clock": [], "losses": []})
        found = tune(*arguments, **options)
        BLOCKS[-1]["clock"].append(now())
        return found

    def begun(*arguments: Any) -> Any:
        BLOCKS[-1]["clock"].append(now())
        BLOCKS[-1]["losses"].append(0.0)
        return pieces(*arguments)

    def measured(*arguments: Any) -> torch.Tensor:
        found = loss(*arguments)
        BLOCKS[-1]["losses"][-1] += float(found.detach())
        return found

    signround_pass.tune = timed
    signround_pass._Block.pieces, signround_pass._Block.loss = begun, measured  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
