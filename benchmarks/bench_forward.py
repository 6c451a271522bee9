"""The calibration forward of one Gated DeltaNet layer and one full-attention layer at full width, part by part.

    python benchmarks/bench_forward.py [--tokens 1024] [--samples 4] [--hessian] [--json FILE]

Out: a table and JSON: the rate of the linears inside the forward against the same products alone, measured in turn in the same
run, and the seconds of everything else: delta rule, attention, convolution and norms, statistics.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import qwen3_6_files
from measuring import options, table, write_json
from mtpress.calibration.block_hessian import InputHessian
from mtpress.calibration.samples import InputAmax
from mtpress.models.qwen3_5 import layers as qwen3_5_layers
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.models.qwen3_5.names import layer_shapes
from qwen3_6_files import WIDTHS

KINDS = {0: "linear_attention", 3: "full_attention"}
FIRST_OF_THEIR_INPUT = {
    "linear_attn.in_proj_qkv", "linear_attn.out_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj",
}  # fmt: skip


class Clock:
    """Seconds by part of the forward, and the operations of the linears."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.operations = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds[part] += time.perf_counter() - started
            return result

        return call


def main() -> None:
    parser = options(__doc__ or "", "bench_forward")
    parser.add_argument("--hessian", action="store_true", help="with the sums that rounding hessian wants")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=4)
    chosen = parser.parse_args()
    config = qwen3_6_files.config(WIDTHS["27b"], 4)
    found: dict[str, Any] = {"tokens": chosen.tokens, "samples": chosen.samples}
    rows = []
    for index, kind in KINDS.items():
        weights = {name: 0.02 * torch.randn(shape, dtype=torch.bfloat16) for name, shape in layer_shapes(config, kind).items()}
        body = StreamedBody(config, torch.device("cpu"))
        samples = [_Sample(chosen.tokens) for _ in range(chosen.samples)]
        body.embed(samples, lambda ids: torch.randn(len(ids), WIDTHS["27b"].hidden_size))  # type: ignore[arg-type]
        clock, alone = Clock(), Counter[str]()
        forward = nn.Linear.forward

        def linear(
            self: nn.Linear, x: torch.Tensor, forward: Any = forward, clock: Clock = clock, alone: Counter[str] = alone
        ) -> torch.Tensor:
            clock.operations += 2.0 * x.numel() * self.weight.shape[0]
            result: torch.Tensor = clock.timed("linears", forward)(self, x)
            started = time.perf_counter()
            F.linear(x.reshape(-1, x.shape[-1]), self.weight)  # the same product, alone, right after
            alone["products"] += time.perf_counter() - started
            return result

        attention = F.scaled_dot_product_attention
        rule = qwen3_5_layers.chunk_gated_delta_rule
        amax = InputAmax(hessian=InputHessian(), weighted=FIRST_OF_THEIR_INPUT) if chosen.hessian else InputAmax()
        nn.Linear.forward = linear  # type: ignore[method-assign]
        F.scaled_dot_product_attention = clock.timed("attention", attention)  # type: ignore[assignment]
        qwen3_5_layers.chunk_gated_delta_rule = clock.timed("delta rule", rule)  # type: ignore[assignment]
        torch.nn.functional.scaled_dot_product_attention = F.scaled_dot_product_attention
        started = time.perf_counter()
        try:
            body.layer(index, weights, clock.timed("statistics", amax))
        finally:
            nn.Linear.forward, qwen3_5_layers.chunk_gated_delta_rule = forward, rule  # type: ignore[method-assign]
            F.scaled_dot_product_attention = attention
        whole = time.perf_counter() - started - alone["products"]
        inside, products = clock.operations / clock.seconds["linears"], clock.operations / alone["products"]
        other = whole - sum(clock.seconds.values())
        found[kind] = {
            "seconds": whole, "linears_flops": inside, "products_flops": products, "linears_to_products": inside / products,
            "forward_to_products": clock.operations / whole / products, "spent": dict(clock.seconds) | {"other": other},
        }  # fmt: skip
        share = {part: f"{clock.seconds[part] / whole:.1%}" for part in ("linears", "delta rule", "attention", "statistics")}
        rows.append(
            (
                kind,
                inside / 1e9,
                products / 1e9,
                inside / products,
                clock.operations / whole / products,
                *share.values(),
                f"{other / whole:.1%}",
            )
        )
    headings = [
        "layer",
        "linears GFLOP/s",
        "same products alone",
        "ratio",
        "whole forward / products",
        "linears",
        "delta rule",
        "attention",
    ]
    table([*headings, "statistics", "conv, norms, rest"], rows)
    write_json(chosen.json, found)


class _Sample:
    """Random tokens without pictures."""

    pixel_values = image_grid_thw = None

    def __init__(self, tokens: int) -> None:
        self.input_ids = torch.zeros(tokens, dtype=torch.int64)


if __name__ == "__main__":
    main()
