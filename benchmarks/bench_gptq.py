"""GPTQ against nearest codes at the same scales, and against auto-round: errors on mtpress-tiny; time and memory at the width of 27B.

    python benchmarks/bench_gptq.py [--samples 64] [--damping 0.05] [--auto-round 200] [--wide-samples 8] [--wide-tokens 512]
                                     [--skip-error] [--json FILE]

Out: tables and JSON.
error   mtpress-tiny's language model is rounded by 64 samples of 128 tokens. Then, for 64 other samples: the squared error of each
        layer's output over the output's squares, the rounded layers before included, and the KL divergence (nats a token, over the
        whole vocabulary) from what the BF16 model says, with the standard error over samples. NVFP4 with its activations rounded as
        vLLM's emulation rounds them. --auto-round N: the real auto-round, N iterations on the same samples, in .envs/autoround; 0
        leaves it out.
wide    A text model of one Gated DeltaNet and one full-attention layer of hidden size 5120 and intermediate size 17408, random weights:
        `mtpress quantize` by rounding gptq, with what preflight promised; then what the parts of the largest matrix take. Random
        weights say nothing of errors. --wide-samples 0 leaves it out.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from bench_signround import HERE, chunks, read_weights, write_tiny, write_wide
from measuring import measured, mtpress, options, record, table, write_calibration, write_json
from mtpress.builtin import CALIBRATION_FILE, EVALUATION_FILE
from mtpress.calibration.full_hessian import FullHessian
from mtpress.calibration.gptq import GptqPass, Kernel, Settings
from mtpress.chat.sample import Sample
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import read_tensor
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.plan.plan import Plan, make_plan
from mtpress.plan.recipe import GPTQ_SCALES, parse_recipe
from mtpress.progress import human_bytes, human_seconds
from mtpress.rounding import gptq

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {"name": "gptq", "summary": "a benchmark", "quantize": ["attention", "gdn", "mlp"], "rounding": "gptq"}


@dataclass
class Contender:
    """BF16 weights by name, and the input_scale of each module whose inputs are rounded."""

    weights: Mapping[str, Tensor]
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)


def main() -> None:
    parser = options(__doc__ or "", "bench_gptq")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--damping", type=float, default=gptq.DAMPING)
    parser.add_argument("--auto-round", type=int, default=200)
    parser.add_argument("--wide-samples", type=int, default=8)
    parser.add_argument("--wide-tokens", type=int, default=512)
    parser.add_argument("--skip-error", action="store_true")
    chosen = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        if not chosen.skip_error:
            found["error"] = compare_errors(Path(scratch), chosen.samples, chosen.damping, chosen.auto_round)
        if chosen.wide_samples:
            found["wide"] = measure_wide(Path(scratch), chosen.wide_samples, chosen.wide_tokens)
    write_json(chosen.json, found)


def compare_errors(here: Path, num_samples: int, damping: float, auto_round: int) -> dict[str, Any]:
    source = Checkpoint.open(write_tiny(here / "tiny"))
    ids = chunks(CALIBRATION_FILE, num_samples)
    contenders: dict[str, Contender] = {}
    losses: dict[str, Any] = {}
    for form, names in GPTQ_SCALES.items():
        plan = make_plan(source, parse_recipe({**RECIPE, "format": form}, "benchmark"))
        for scales in names:
            nearest, by_gptq, said = rounded(plan, Settings(scales, damping), ids, here / f"{form}-{scales}")
            contenders |= {f"{form} {scales}": nearest, f"{form} {scales} + gptq": by_gptq}
            losses[f"{form} {scales}"] = said
    if auto_round:
        contenders[f"auto-round, {auto_round} iterations"] = by_auto_round(source, ids, here, auto_round)
    errors = evaluate(source, contenders, chunks(EVALUATION_FILE, 64))
    layers = range(len(next(iter(errors.values()))["layers"]))
    rows = [[who, *(f"{e:.5f}" for e in of["layers"]), f"{of['kl']:.4f} ± {of['kl_error']:.4f}"] for who, of in errors.items()]
    table(["", *(f"layer {i}" for i in layers), "KL"], rows)
    return {"errors": errors, "held_out": losses}


def rounded(plan: Plan, settings: Settings, ids: Sequence[Sequence[int]], here: Path) -> tuple[Contender, Contender, Any]:
    """The nearest codes, GPTQ's where they help, and the errors by which that was decided."""
    form, samples = gptq.FORMATS[plan.recipe.format], [Sample(torch.tensor(sample)) for sample in ids]

    def passed(directory: Path) -> tuple[Contender, GptqPass]:
        directory.mkdir(parents=True)
        tuning, made = GptqPass(plan, samples, CPU, directory, settings), {}
        for step in plan.steps:
            if step.layer is not None:
                made |= tuning.layer(step, {info.name: read_tensor(info) for job in step.jobs for info in job.sources})
        tuning.close()
        weights = {f"{name}.weight": form.dequantize(stored).bfloat16() for name, stored in made.items()}
        return Contender(weights, {name: stored["input_scale"] for name, stored in made.items() if "input_scale" in stored}), tuning

    by_gptq, tuning = passed(here / "gptq")
    with patch.object(gptq, "round_matrix", lambda weight, scales, _, form: gptq.nearest(weight, scales, form)):
        nearest, _ = passed(here / "nearest")  # scales that follow from H are then those of a body without GPTQ
    return nearest, by_gptq, {layer: said.as_json() for layer, said in tuning.losses.items()}


def by_auto_round(source: Checkpoint, ids: Sequence[Sequence[int]], here: Path, iterations: int) -> Contender:
    python = subprocess.run(
        [sys.executable, HERE.parent / "locks/make_env.py", "autoround"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()[-1]  # fmt: skip
    tokens = here / "tokens.json"
    tokens.write_text(json.dumps(ids), encoding="utf-8")
    script, out = HERE / "autoround_timed.py", here / "auto-round"
    measured([python, str(script), str(source.path), str(out), str(tokens), "--iters", str(iterations)])
    return Contender(read_weights(out))


@torch.no_grad()
def evaluate(source: Checkpoint, contenders: Mapping[str, Contender], tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Who → layers: squared error of each layer's output over its squares; kl: mean over all tokens; kl_error: standard error of that."""
    body, ids = StreamedBody(source.config, CPU), torch.tensor(tokens)
    positions = torch.arange(ids.shape[1]).expand(3, len(ids), -1)
    exact = source.read("model.embed_tokens.weight")[ids]
    states = dict.fromkeys(contenders, exact)
    found: dict[str, Any] = {who: {"layers": []} for who in contenders}
    for layer in range(body.text_config.num_hidden_layers):
        start = f"model.layers.{layer}."
        weights = {name.removeprefix(start): source.read(name) for name in source.tensors if name.startswith(start)}

        def through(inputs: Tensor, who: Contender, layer: int = layer, start: str = start, weights: dict[str, Tensor] = weights) -> Tensor:
            module = body.decoder_layer(layer, {name: who.weights.get(start + name, weight) for name, weight in weights.items()})
            for name, linear in module.named_modules():
                if (scale := who.input_scales.get(start + name)) is not None:
                    linear.register_forward_pre_hook(Kernel(scale))
            with body.delta_rule(module):
                return body.through(module, inputs, positions)

        exact = through(exact, Contender({}))
        for who, contender in contenders.items():
            states[who] = through(states[who], contender)
            found[who]["layers"].append(float((states[who].double() - exact.double()).square().sum() / exact.double().square().sum()))
    says = speaker(source, body)
    for who, of in found.items():
        divergence = F.kl_div(says(states[who]), says(exact), log_target=True, reduction="none").sum(-1).mean(-1).tolist()
        of |= {"kl": statistics.mean(divergence), "kl_error": statistics.stdev(divergence) / len(divergence) ** 0.5}
    return found


def speaker(source: Checkpoint, body: StreamedBody) -> Callable[[Tensor], Tensor]:
    """States behind the last layer → log probabilities, float64."""
    norm, head = source.read("model.norm.weight").double(), source.read("lm_head.weight").double()
    eps = body.text_config.rms_norm_eps

    def says(states: Tensor) -> Tensor:
        wide = states.double()
        wide = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + norm)
        return F.log_softmax(wide @ head.t(), -1)

    return says


def measure_wide(here: Path, samples: int, tokens: int) -> dict[str, Any]:
    source, found, rows = write_wide(here / "wide"), {}, []
    texts = write_calibration(here / "texts.jsonl", samples, tokens)
    for form in GPTQ_SCALES:
        recipe, out = here / f"{form}.yaml", here / f"wide-{form}"
        calibration = {"num_samples": samples, "max_seq_len": tokens}
        recipe.write_text(yaml.safe_dump({**RECIPE, "format": form, "calibration": calibration}), encoding="utf-8")
        before = cpu_seconds()
        mtpress("quantize", source, out, "--recipe", recipe, "--calibration", texts)
        said = record(out)
        promised, took = said["preflight"]["promised"], {**said["preflight"]["took"], "cpu_seconds": cpu_seconds() - before}
        cells = [f"{human_seconds(of['seconds'])}, {human_bytes(of['memory_bytes'])}" for of in (took, promised)]
        rows.append([form, f"{samples} × {tokens}", human_seconds(took["cpu_seconds"]), *cells])
        found[form] = {"promised": promised, "took": took, "losses": said["losses"]}
    print("\ntwo layers at the width of 27B")
    table(["format", "tokens", "CPU time", "took", "promised"], rows)
    found["parts"] = parts = measure_parts(tokens)
    print("\nparts of down_proj, [5120, 17408]")
    table(["", "CPU seconds"], [[name, f"{seconds:.1f}"] for name, seconds in parts.items()])
    return found


def cpu_seconds() -> float:
    """Of all commands so far; they stand still while other work has the cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_parts(tokens: int) -> dict[str, float]:
    n, k = 5120, 17408
    random = torch.Generator().manual_seed(0)
    clock, parts = time.process_time(), {}

    def lap(name: str) -> None:
        nonlocal clock
        parts[name] = time.process_time() - clock
        clock = time.process_time()

    inputs, weight = torch.randn(tokens, k, generator=random).bfloat16(), torch.randn(n, k, generator=random).bfloat16()
    hessian = FullHessian(k, [0], CPU)
    lap("random numbers")
    hessian.add(0, inputs)
    total = hessian.total()
    del hessian
    lap(f"H of {tokens} tokens")
    factor = gptq.factorize(total)
    del total
    lap("factor")
    for form, scales in (("nvfp4", "max"), ("int4", "rtn")):
        chosen = gptq.SCALES[form][scales]({"w": weight}, torch.empty(0))["w"]
        lap(f"{form} scales")
        gptq.round_matrix(weight, chosen, factor, gptq.FORMATS[form])
        lap(f"{form} codes")
    return parts


if __name__ == "__main__":
    main()
