"""Writes a random-weight BF16 checkpoint in the exact layout of Qwen3.6-27B, at any depth and width.

In: a new directory, a depth, a width, a seed. Out: shards, index, config, tokenizer, processor files and template, as the
release lays them out; the same bytes for the same arguments. For shapes, memory and speed: the model knows nothing.
Leaves out: the values (random_weights.py) and what stands beside the weights (qwen3_6_files.py).

    python benchmarks/full_size.py OUT                              55.6 GB: 64 layers, 27.78 billion parameters
    python benchmarks/full_size.py OUT --layers 16                  every tensor at full size, 19 GB
    python benchmarks/full_size.py OUT --sparse                     true headers, weights of zeros that take no disk
    python benchmarks/full_size.py OUT --width tiny --layers 4      a few MB
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import qwen3_6_files
from mtpress.checkpoint.checkpoint import INDEX_NAME
from mtpress.checkpoint.record import peak_memory_bytes
from mtpress.checkpoint.shard_writer import OutputTensor, shard_header
from mtpress.checkpoint.writer import CheckpointWriter, split_into_shards
from mtpress.errors import InputError, MtpressError
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.progress import Progress, human_bytes
from qwen3_6_files import MIN_VOCAB_SIZE, WIDTHS, Width

PREFIX = "model.language_model."
MAX_QUEUED_BYTES = 64 << 20


@dataclass(frozen=True)
class FullSize:
    """What was written. Sizes in bytes, `peak_memory_bytes` of the whole process."""

    out: str
    num_layers: int
    num_tensors: int
    num_params: int
    num_bytes: int
    num_shards: int
    seconds: float
    peak_memory_bytes: int


def tensors(width: Width, layers: int) -> list[OutputTensor]:
    """Every tensor of the checkpoint: embeddings, decoder layers, final norm, lm_head, vision tower, draft head."""
    config = qwen3_6_files.config(width, layers)
    shapes = dict(qwen3_5.body_shapes(config, PREFIX)) | qwen3_5.vision_shapes(config) | qwen3_5.mtp_shapes(config)
    return [OutputTensor(name, "BF16", shape) for name, shape in shapes.items()]


def write_sparse(out: Path, shards: Mapping[str, Sequence[OutputTensor]], files: Mapping[str, bytes]) -> None:
    """A checkpoint of true headers and of weights that are holes in the files: zeros that take no disk."""
    out.mkdir(parents=True)
    for name, planned in shards.items():
        header = shard_header(planned, {"format": "pt"})
        (out / name).write_bytes(header)
        os.truncate(out / name, len(header) + sum(tensor.num_bytes for tensor in planned))
    for name, content in files.items():
        (out / name).write_bytes(content)
    index = {"metadata": {}, "weight_map": {tensor.name: name for name, planned in shards.items() for tensor in planned}}
    (out / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def make_full_size(
    out: str | Path, *, layers: int = 64, width: str | Width = "27b", seed: int = 0, sparse: bool = False, silent: bool = True
) -> FullSize:
    """Writes the checkpoint; InputError where a size cannot be or `out` exists."""
    started = time.perf_counter()
    chosen = WIDTHS[width] if isinstance(width, str) else width
    if layers < 1 or min(asdict(chosen).values()) < 1 or chosen.vocab_size < MIN_VOCAB_SIZE:
        raise InputError(f"{layers} layers of {chosen}: sizes are at least 1, the vocabulary at least {MIN_VOCAB_SIZE}")
    planned = tensors(chosen, layers)
    shards = split_into_shards([[tensor] for tensor in planned])
    files = qwen3_6_files.files(chosen, layers)
    target = Path(out)
    if target.exists():
        raise InputError(f"{target}: exists already; name a directory that does not")
    if sparse:
        write_sparse(target, shards, files)
    else:
        _write(target, shards, files, seed, layers, silent)
    return FullSize(
        out=str(target),
        num_layers=layers,
        num_tensors=len(planned),
        num_params=sum(math.prod(tensor.shape) for tensor in planned),
        num_bytes=sum(tensor.num_bytes for tensor in planned),
        num_shards=len(shards),
        seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _write(
    out: Path, shards: Mapping[str, Iterable[OutputTensor]], files: Mapping[str, bytes], seed: int, layers: int, silent: bool
) -> None:
    from random_weights import RandomWeights  # torch from here on

    weights = RandomWeights(seed, layers)
    planned = [tensor for group in shards.values() for tensor in group]
    with (
        CheckpointWriter(out, shards, {"format": "pt"}, max_queued_bytes=MAX_QUEUED_BYTES) as writer,
        Progress("generate", sum(tensor.num_bytes for tensor in planned), silent=silent) as progress,
    ):
        for tensor in planned:
            writer.write_pieces(tensor.name, weights.pieces(tensor.name, tensor.shape))
            progress.advance(tensor.num_bytes, ".".join(tensor.name.split(".")[-4:-1])[:24])
        writer.wait()
        for name, content in files.items():
            writer.write_file(name, content)
        writer.finish()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="full_size.py", description="A random-weight checkpoint in the layout of Qwen3.6-27B.")
    parser.add_argument("out", metavar="OUT", help="the directory to make; it must not exist")
    parser.add_argument("--layers", type=int, default=64, help="decoder layers, every fourth with full attention (default 64)")
    parser.add_argument("--width", choices=sorted(WIDTHS), default="27b", help="the dimensions to start from (default 27b)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sparse", action="store_true", help="headers only: the weights are holes in the files")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    for size in fields(Width):
        parser.add_argument(f"--{size.name.replace('_', '-')}", type=int, metavar="N", help=f"default {size.default} (27b)")
    return parser.parse_args(argv)


def main() -> int:
    options = parse()
    chosen = {size.name: getattr(options, size.name) for size in fields(Width) if getattr(options, size.name) is not None}
    try:
        made = make_full_size(
            options.out, layers=options.layers, width=replace(WIDTHS[options.width], **chosen), seed=options.seed,
            sparse=options.sparse, silent=options.json,
        )  # fmt: skip
    except MtpressError as error:
        print(f"full_size.py: {error}", file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps(asdict(made), indent=2))
    else:
        rate = human_bytes(made.num_bytes / made.seconds)
        print(
            f"{made.out}: {made.num_params / 1e9:.2f} billion parameters in {made.num_tensors} tensors, {made.num_shards} shards, "
            f"{human_bytes(made.num_bytes)} in {made.seconds:.1f} s ({rate}/s), peak memory {human_bytes(made.peak_memory_bytes)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
