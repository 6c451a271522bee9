"""What each choice of NVFP4's scales does to the outputs of a full-width layer, on inputs that it was not calibrated with.

    python benchmarks/bench_rounding_error.py [--tokens 1024] [--unseen 256] [--json FILE]

One Gated-DeltaNet and one full-attention layer of the 27B model's width, random weights with heavy tails (random_weights.py). The
hidden states in front of them are made up: correlated channels of unequal size, 24 of them 30 times as large as the rest, as trained
models have. They pass through the layer, so what o_proj, out_proj and down_proj read is what the layer makes of them. Out: a table and
JSON: of each linear, the share of its output's energy on unseen tokens that is error, against "max". "hessian, gptq": GPTQ's codes under
the scales of "hessian".
"""

from collections.abc import Mapping

import torch

import qwen3_6_files
from full_size import PREFIX, WIDTHS
from measuring import options, table, write_json
from mtpress.calibration.block_hessian import InputHessian
from mtpress.calibration.full_hessian import FullHessian
from mtpress.formats import nvfp4
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.quantization.rounders import NVFP4_ROUNDINGS
from mtpress.rounding import gptq
from random_weights import RandomWeights

CHOICES = ("max", "four-over-six", "sweep", "hessian")
GPTQ = "hessian, gptq"
KINDS = {"Gated DeltaNet": 0, "full attention": 3}
NUM_OUTLIERS, OUTLIER_SIZE, RANK = 24, 30.0, 256


def layer_weights(config: Mapping[str, object], index: int) -> dict[str, torch.Tensor]:
    start, made = f"{PREFIX}layers.{index}.", RandomWeights(0, 64)
    shapes = {name: shape for name, shape in qwen3_5.body_shapes(config, PREFIX) if name.startswith(start)}
    return {name.removeprefix(start): torch.cat(list(made.pieces(name, shape))) for name, shape in shapes.items()}


def hidden_states(tokens: int, width: int) -> torch.Tensor:
    """BF16 [1, T, width]."""
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(0.5 * torch.randn(width, generator=generator))
    size[torch.randperm(width, generator=generator)[:NUM_OUTLIERS]] *= OUTLIER_SIZE
    shared = torch.randn(tokens, RANK, generator=generator) @ torch.randn(RANK, width, generator=generator) / RANK**0.5
    return ((shared + torch.randn(tokens, width, generator=generator)) * size).bfloat16().unsqueeze(0)


def layer_errors(index: int, tokens: int, unseen: int) -> dict[str, dict[str, float]]:
    """Linear → choice → error energy over output energy."""
    config = qwen3_6_files.config(WIDTHS["27b"], 4)
    body = StreamedBody(config, torch.device("cpu"))
    weights = layer_weights(config, index)
    module, read = body.decoder_layer(index, weights), dict[str, torch.Tensor]()
    for name, linear in module.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(lambda _, given, name=name: read.__setitem__(name, given[0][0]))
    states = hidden_states(tokens + unseen, WIDTHS["27b"].hidden_size)
    with torch.no_grad(), body.delta_rule(module):
        body.through(module, states, torch.arange(tokens + unseen).expand(3, 1, -1))
    found: dict[str, dict[str, float]] = {}
    wanted = [name for part in qwen3_5.QUANTIZABLE.values() for name in part if name in read]
    groups = dict.fromkeys(tuple(m for m in qwen3_5.SAME_INPUT.get(name, (name,)) if m in wanted) for name in wanted)
    for group in groups:
        hessian = InputHessian()
        hessian.add("", read[group[0]][:tokens])
        x = read[group[0]][tokens:].float()
        matrices = {name: weights[f"{name}.weight"] for name in group}
        for choice in (*CHOICES, GPTQ):
            if choice == GPTQ:
                rounded = gptq_rounded(matrices, hessian.total(""), read[group[0]][:tokens])
            else:
                rounded = NVFP4_ROUNDINGS[choice](matrices, hessian.total(""))
            for name in group:
                exact, parts = weights[f"{name}.weight"].float(), rounded[name]
                error = nvfp4.dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"]) - exact
                share = (x @ error.T).double().square().sum() / (x @ exact.T).double().square().sum()
                found.setdefault(name, {})[choice] = float(share)
    return found


def gptq_rounded(matrices: Mapping[str, torch.Tensor], blocks: torch.Tensor, read: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    form, full = gptq.FORMATS["nvfp4"], FullHessian(read.shape[1], [0], read.device)
    full.add(0, read)
    factor = gptq.factorize(full.total())
    scales = gptq.SCALES["nvfp4"]["hessian"](matrices, blocks)
    return {name: form.store(gptq.round_matrix(weight, scales[name], factor, form), scales[name]) for name, weight in matrices.items()}


def main() -> None:
    parser = options(__doc__ or "", "bench_rounding_error")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--unseen", type=int, default=256)
    chosen = parser.parse_args()
    found = {kind: layer_errors(index, chosen.tokens, chosen.unseen) for kind, index in KINDS.items()}
    rows = [
        (kind, name, f"{errors['max']:.5f}", *(f"{errors[choice] / errors['max']:.3f}" for choice in (*CHOICES[1:], GPTQ)))
        for kind, linears in found.items()
        for name, errors in linears.items()
    ]
    table(["layer", "linear", "max", *(f"{choice} / max" for choice in (*CHOICES[1:], GPTQ))], rows)
    write_json(chosen.json, {"errors": found, "tokens": chosen.tokens, "unseen": chosen.unseen})


if __name__ == "__main__":
    main()
