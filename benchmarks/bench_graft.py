"""graft and metadata-only revisions on a full-width NVFP4 checkpoint: time, peak memory, bytes read and written, cold caches.

    python benchmarks/bench_graft.py [--layers 16] [--width 27b] [--rounds 3] [--json FILE]

The body is quantized weight-only from a source whose weights are holes (its numbers matter to nobody here, its sizes do); the head
that is grafted is of random numbers. Three cases: the head is lost, so that every shard is linked; a head of another model stands
among the body's tensors, so that its shard is written anew; only config.json changes, so that no weight is read. Out: a table and
JSON, seconds of each round. For 16 layers at full width it takes 12 GB of disk under build/ for some minutes, and deletes it.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from full_size import make_full_size
from measuring import Run, make_cold, measured, mtpress, options, table, write_json
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.revision import Revision
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.models.qwen3_5.names import MTP_PREFIX, mtp_shapes
from mtpress.plan.recipe import load_recipe
from mtpress.progress import human_bytes
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize
from qwen3_6_files import WIDTHS

# What repair does when only metadata is wrong: the config anew, every shard a link. Prints what the process has read, in bytes.
METADATA_ONLY = """
import sys
from pathlib import Path
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.revision import Revision
revised = Revision(Checkpoint.open_stored(sys.argv[1]), "mtp.")
revised.write_file("config.json", b"{}")
revised.write(Path(sys.argv[2]), "revise", {}, silent=True)
"""
COUNTED = 'print(next(line.split()[1] for line in open("/proc/self/io") if line.startswith("read_bytes")))'


def write_head(out: Path, source: Checkpoint, layers: int) -> None:
    """A base of which only the head was fetched, with random numbers."""
    from random_weights import RandomWeights

    weights, shapes = RandomWeights(7, layers), mtp_shapes(source.config)
    planned = [OutputTensor(name, "BF16", shape) for name, shape in shapes.items()]
    with CheckpointWriter(out, {"model-head.safetensors": planned}, {"format": "pt"}) as writer:
        for name, shape in shapes.items():
            writer.write_pieces(name, weights.pieces(name, shape))
        writer.wait()
        writer.write_file("config.json", (source.path / "config.json").read_bytes())
        writer.finish()


def without_head(quantized: Path, out: Path) -> None:
    """What an exporter makes that does not know of the head: its tensors are gone, and no list names them."""
    revised = Revision(Checkpoint.open_stored(quantized), "mtp.")
    for name in revised.source.tensors:
        if name.startswith(MTP_PREFIX):
            revised.drop(name)
    for file, keys in {
        "config.json": ("quantization_config", "ignore"),
        "hf_quant_config.json": ("quantization", "exclude_modules"),
    }.items():
        content = json.loads((quantized / file).read_text())
        inner = content[keys[0]]
        inner[keys[1]] = [entry for entry in inner[keys[1]] if not entry.startswith(MTP_PREFIX)]
        revised.write_file(file, json.dumps(content).encode())
    revised.write(out, "drop", {}, silent=True)


def tried(rounds: int, source: Path, base: Path, out: Path, run: Callable[[], Run]) -> list[Run]:
    done = []
    for _ in range(rounds):
        make_cold(source)
        make_cold(base)
        done.append(run())
        if len(done) < rounds:
            shutil.rmtree(out)
    return done


def bench(scratch: Path, layers: int, width: str, rounds: int) -> dict[str, Any]:
    """Case → seconds of each round, peak bytes, and what was written and linked."""
    holes, quantized, lost, base = (scratch / name for name in ("holes", "quantized", "lost", "base"))
    make_full_size(holes, layers=layers, width=WIDTHS[width], sparse=True, silent=True)
    recipe = load_recipe("nvfp4-mtp-vlm").model_copy(update={"constant_input_scale": 0.01})
    quantize(holes, quantized, recipe, silent=True)
    write_head(base, Checkpoint.open(holes), layers)
    without_head(quantized, lost)
    found: dict[str, Any] = {"checkpoint_bytes": Checkpoint.open(quantized).num_bytes, "layers": layers, "width": width}
    for case, source in {"head lost": lost, "wrong head among the body's tensors": quantized}.items():
        out = scratch / "out"
        runs = tried(rounds, source, base, out, lambda: mtpress("graft", source, scratch / "out", "--from", base, "--replace-head"))  # noqa: B023
        said = json.loads(runs[-1].stdout)
        facts = {key: said[key] for key in ("linked", "rewritten", "new", "bytes_written", "bytes_linked")}
        found[case] = {"seconds": [run.seconds for run in runs], "peak_bytes": max(run.peak_bytes for run in runs), **facts}
        assert not [finding for finding in check(out, hashes=True, silent=True).findings if finding.severity == "error"]
        shutil.rmtree(out)
    out = scratch / "out"
    command = [sys.executable, "-c", METADATA_ONLY + COUNTED, str(quantized), str(out)]
    runs = tried(rounds, quantized, base, out, lambda: measured(command))
    read = [int(run.stdout.split()[-1]) for run in runs]
    found["config.json alone"] = {
        "seconds": [run.seconds for run in runs],
        "peak_bytes": max(r.peak_bytes for r in runs),
        "bytes_read": read,
    }
    return found


def main() -> None:
    parser = options(__doc__ or "", "bench_graft")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", choices=sorted(WIDTHS), default="27b")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="build") as scratch:
        found = bench(Path(scratch), chosen.layers, chosen.width, chosen.rounds)
    print(f"{human_bytes(found['checkpoint_bytes'])} in NVFP4, {chosen.layers} layers, width {chosen.width}")
    rows = []
    for case, facts in found.items():
        if isinstance(facts, dict):
            written, linked = (human_bytes(facts[key]) if key in facts else "-" for key in ("bytes_written", "bytes_linked"))
            rows.append(
                (
                    case,
                    min(facts["seconds"]),
                    " ".join(f"{s:.1f}" for s in facts["seconds"]),
                    written,
                    linked,
                    human_bytes(facts["peak_bytes"]),
                )
            )
    table(["case", "seconds", "rounds", "written", "linked", "peak memory"], rows)
    print(f"read from the disk for config.json alone: {human_bytes(max(found['config.json alone']['bytes_read']))}")
    write_json(chosen.json, found)


if __name__ == "__main__":
    main()
