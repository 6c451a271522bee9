"""Second-hand checkpoints of the trained model, broken and mended: what is wrong with each, and which stage puts it right.

In: the exports of tests/real_exports.py and, where people change them by hand, the same change; the small checkpoints of
tests/breaks.py. Out: for each the directory as it comes and the one that mtpress makes of it, and what vLLM says to loading
them. Leaves out: judging that (test_second_hand.py, benchmarks/second_hand.py).
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from breaks import Break
from checkpoints import Edit
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import INDEX_NAME
from mtpress.formats import int4
from mtpress.rounding import rtn
from mtpress.stages.convert import convert
from mtpress.stages.graft import graft
from mtpress.stages.repair import repair
from real_exports import real_export

FC = "mtp.fc"
LOAD = Path(__file__).with_name("load_on_cpu.py")
LOAD_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class SecondHand:
    """title: for the table. rules: what check must say of it. loads: whether vLLM loads target and draft with its check for
    missing weights. broken(folder), mended(broken, out): make the directories. remedy: the commands, as the table shows them."""

    title: str
    rules: frozenset[str]
    loads: bool
    broken: Callable[[Path], Path]
    mended: Callable[[Path, Path], object]
    remedy: str


def as_it_is(export: str) -> Callable[[Path], Path]:
    return lambda folder: real_export(export)


def copied(export: str, folder: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(real_export(export), folder / "broken"))


def head_ignored_by_hand(folder: Path) -> Path:
    """modelopt's export, whose head is missing, made to start: people add mtp to the lists, and the engine draws a head at random."""
    broken = copied("modelopt", folder)
    config, hf = json.loads((broken / "config.json").read_text()), json.loads((broken / "hf_quant_config.json").read_text())
    config["quantization_config"]["ignore"].append("mtp*")
    hf["quantization"]["exclude_modules"].append("mtp*")
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "hf_quant_config.json").write_text(json.dumps(hf))
    return broken


def fc_packed(folder: Path) -> Path:
    """auto-round's export as its older versions left it: mtp.fc in INT4 too, which 0.16.1 keeps out."""
    broken = copied("autoround", folder)
    shard = broken / "model_extra_tensors.safetensors"
    tensors = load_file(shard)
    tensors |= {f"{FC}.{part}": tensor for part, tensor in int4.tensors(*rtn.round_matrix(tensors.pop(f"{FC}.weight"))).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((broken / INDEX_NAME).read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    (broken / INDEX_NAME).write_text(json.dumps(index))
    config = json.loads((broken / "config.json").read_text())
    del config["quantization_config"]["extra_config"][FC]
    (broken / "config.json").write_text(json.dumps(config))
    return broken


def broken_and_repaired(break_it: Break, sound: Path, base: Path, folder: Path) -> tuple[Path, Path]:
    """A small checkpoint broken by a case of tests/breaks.py, and what repair with its base makes of it; the broken one itself
    where repair finds nothing to do."""
    broken, out = Path(shutil.copytree(sound, folder / "broken")), folder / "repaired"
    edit = Edit(broken)
    break_it(edit)
    edit.save()
    return broken, out if repair(broken, out, base, silent=True).written else broken


def loads(python: Path, checkpoints: Mapping[str, Path], out: Path, *, track: bool) -> dict[str, str | None]:
    """Name → what vLLM says to loading target and draft, None where it loads both; one process for all of them."""
    flags: Iterable[str] = ("--track",) if track else ()
    command = [str(python), str(LOAD), str(out), *flags, *map(str, checkpoints.values())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_TIMEOUT_SECONDS, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    answers = json.loads(out.read_text(encoding="utf-8"))
    told = (next((f"{part}: {answer[part]}" for part in ("target", "draft") if answer[part]), None) for answer in answers)
    return dict(zip(checkpoints, told, strict=True))


def repaired_and_converted(broken: Path, out: Path) -> None:
    between = out.with_name(out.name + "-repaired")
    repair(broken, between, BUILTIN_MODEL, silent=True)
    convert(between, out, "modelopt", silent=True)


SECOND_HAND = {
    "modelopt": SecondHand(
        "modelopt 0.47: no draft head",
        frozenset({"mtp-missing"}),
        False,
        as_it_is("modelopt"),
        lambda broken, out: graft(broken, out, BUILTIN_MODEL, silent=True),
        "graft --from BASE",
    ),
    "modelopt-ignored": SecondHand(
        "the same, `mtp*` added to both ignore lists by hand",
        frozenset({"mtp-missing"}),
        False,
        head_ignored_by_hand,
        lambda broken, out: repair(broken, out, BUILTIN_MODEL, silent=True),
        "repair --base BASE",
    ),
    "autoround": SecondHand(
        "auto-round 0.16.1 W4A16: draft layer rounded to INT4, config files that differ",
        frozenset({"mtp-rounded", "configs-differ", "index-total-size", "tokenizer-backend"}),
        True,
        as_it_is("autoround"),
        lambda broken, out: repair(broken, out, BUILTIN_MODEL, silent=True),
        "repair --base BASE",
    ),
    "autoround-fc": SecondHand(
        "the same, `mtp.fc` in INT4 too, as older auto-round packed it",
        frozenset({"mtp-quantized", "configs-differ", "index-total-size", "tokenizer-backend"}),
        False,
        fc_packed,
        lambda broken, out: repair(broken, out, silent=True),
        "repair",
    ),
    "llmcompressor": SecondHand(
        "llm-compressor 0.14 NVFP4, GDN in BF16 as in its examples",
        frozenset({"index-total-size", "tokenizer-backend"}),
        True,
        as_it_is("llmcompressor"),
        repaired_and_converted,
        "repair --base BASE, convert --to modelopt",
    ),
    "llmcompressor-gdn": SecondHand(
        "llm-compressor 0.14 NVFP4, GDN too: in_proj_qkv and in_proj_z with global scales of their own",
        frozenset({"fused-scales-differ", "index-total-size", "tokenizer-backend"}),
        True,
        as_it_is("llmcompressor-gdn"),
        lambda broken, out: convert(broken, out, "modelopt", rescale=True, silent=True),
        "convert --to modelopt --rescale",
    ),
}
