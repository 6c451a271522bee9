"""Checkpoints of Qwen3.6-27B's full size as headers: the BF16 release, what each shipped recipe makes of it, an INT4 build.

In: a new directory and the name of a layout. Out: a checkpoint whose weights are holes that take no disk, with true headers,
configs, tokenizer and template. For dry runs and the memory model. Leaves out: weights.

    python benchmarks/served_layouts.py OUT [NAME …]      all of them, each in its own directory
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import qwen3_6_files
from full_size import make_full_size, tensors, write_sparse
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.checkpoint.writer import split_into_shards
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import load_recipe, shipped
from mtpress.quantization.output_files import config_files
from qwen3_6_files import WIDTHS

BF16, INT4 = "bf16", "int4-autoround"
LAYERS, GROUP = 64, 128
INT4_LINEARS = tuple(linear for linears in qwen3_5.QUANTIZABLE.values() for linear in linears if linear not in qwen3_5.AB_LINEARS)


def names() -> tuple[str, ...]:
    return (BF16, *shipped(), INT4)


def make_layout(out: Path, name: str) -> Path:
    """Writes one of `names()` to `out`, which must not exist."""
    if name == BF16:
        make_full_size(out, sparse=True)
    elif name == INT4:
        _int4(out)
    else:
        source = out.with_name(f"{out.name}.source")
        make_full_size(source, sparse=True)
        plan = make_plan(Checkpoint.open(source), load_recipe(name))
        beside = qwen3_6_files.files(WIDTHS["27b"], LAYERS) | config_files(plan)
        write_sparse(out, plan.shards, beside)
    return out


def _int4(out: Path) -> None:
    """As AutoRound writes it in GPTQ's packing, with the draft head in BF16 (seed 004)."""
    width = WIDTHS["27b"]
    beside = qwen3_6_files.files(width, LAYERS)
    config = json.loads(beside["config.json"])
    stored = list(_packed(tensors(width, LAYERS)))
    plain = {linear: {"bits": 16, "data_type": "float"} for linear in ("mtp", "lm_head", "visual", *qwen3_5.AB_LINEARS)}
    config["quantization_config"] = {
        "quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": True, "data_type": "int",
        "packing_format": "auto_round:auto_gptq", "extra_config": {f".*{name}.*": kept for name, kept in plain.items()},
    }  # fmt: skip
    beside["config.json"] = json.dumps(config).encode()
    write_sparse(out, split_into_shards([[tensor] for tensor in stored]), beside)


def _packed(planned: list[OutputTensor]) -> Iterator[OutputTensor]:
    for tensor in planned:
        module = qwen3_5.module_of(tensor.name)
        if not tensor.name.startswith("model.language_model.layers.") or not module.endswith(INT4_LINEARS):
            yield tensor
            continue
        n, k = tensor.shape
        yield OutputTensor(f"{module}.qweight", "I32", (k // 8, n))
        yield OutputTensor(f"{module}.qzeros", "I32", (k // GROUP, n // 8))
        yield OutputTensor(f"{module}.scales", "F16", (k // GROUP, n))


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    out = Path(arguments[0])
    out.mkdir(parents=True)
    for name in arguments[1:] or names():
        print(make_layout(out / name, name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
