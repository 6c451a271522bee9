"""The real modelopt, end to end on one checkpoint, with the forward's time apart.

    .envs/modelopt/bin/python benchmarks/modelopt_timed.py SRC OUT TOKENS.json

In: what tests/oracles/modelopt_export.py takes. Out: one JSON line: seconds of each part. Runs on the packages of
locks/modelopt.txt and imports nothing of mtpress.
"""

import json
import sys
import time
from pathlib import Path

STARTED = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/oracles"))

import modelopt.torch.quantization as mtq  # noqa: E402
import torch  # noqa: E402
from modelopt.torch.export import export_hf_checkpoint  # noqa: E402
from modelopt_export import load, quantization_config  # noqa: E402


def main() -> None:
    source, out, tokens = (Path(argument) for argument in sys.argv[1:4])
    seconds = {"import": time.perf_counter() - STARTED, "forward": 0.0}
    started = time.perf_counter()
    model = load(source)
    seconds["load"] = time.perf_counter() - started

    def forward_loop(model: torch.nn.Module) -> None:
        started = time.perf_counter()
        with torch.inference_mode():
            for ids in json.loads(tokens.read_text(encoding="utf-8")):
                model(input_ids=torch.tensor([ids]))
        seconds["forward"] += time.perf_counter() - started

    started = time.perf_counter()
    mtq.quantize(model, quantization_config(in_proj_ab=False), forward_loop)
    seconds["calibrate"] = time.perf_counter() - started - seconds["forward"]
    started = time.perf_counter()
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=out)
    seconds["export"] = time.perf_counter() - started
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
