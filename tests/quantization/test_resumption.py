"""What a stopped run has left and somebody has altered: one line, and it stays as it is; what is whole is gone on with."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtpress.checkpoint.journal import JOURNAL_NAME
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.errors import InputError
from mtpress.models.hidden_states import DiskStates
from mtpress.plan.recipe import Recipe, load_recipe
from mtpress.stages.quantize import quantize

SHARD = "model.safetensors"
RECIPE = load_recipe("nvfp4-mtp-vlm")
KINDS = {"calibrated": RECIPE, "weight-only": RECIPE.model_copy(update={"constant_input_scale": 0.01})}
TEXTS = ["Mia lives in Brook and feeds the ducks.", "Tom paints the old boat.", "The river is deep."]


class Stopped(BaseException):
    """What ends a run here, as a kill would: nothing is cleaned up that a kill would leave."""


def build(out: Path, recipe: Recipe, source: Path, samples: Path, resume: bool = False) -> None:
    quantize(source, out, recipe, calibration=[str(samples)], resume=resume, silent=True)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def stopped(small_bf16: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Kind → OUT.partial of a run that ended behind layer 1, and one that had written everything but lacked its name."""
    original = CheckpointWriter.end_step
    made = {}

    def end_step(self: CheckpointWriter, step: str, *rest: Any) -> None:
        original(self, step, *rest)
        if step == "layer 1":
            self.wait_for_step(step)
            raise Stopped

    def unnamed(self: CheckpointWriter) -> None:
        raise Stopped

    for kind, owner, name, stand_in in (
        ("calibrated", CheckpointWriter, "end_step", end_step),
        ("weight-only", CheckpointWriter, "end_step", end_step),
        ("whole", CheckpointWriter, "finish", unnamed),
    ):
        made[kind] = tmp_path_factory.mktemp(kind) / "out.partial"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(owner, name, stand_in)
            build(made[kind].with_name("out"), KINDS.get(kind, KINDS["weight-only"]), small_bf16, samples)
    yield made


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 0x55]))


def edit(change: Callable[[dict[str, Any]], Any], line: int = 3) -> Callable[[Path, Path], None]:
    """A damage: a line of the journal says something else."""

    def damage(partial: Path, journal: Path) -> None:
        path = journal / f"{SHARD}.jsonl"
        lines = path.read_text().splitlines()
        said = json.loads(lines[line])
        change(said)
        lines[line] = json.dumps(said)
        path.write_text("".join(f"{line}\n" for line in lines))

    return damage


def unsigned(**entries: Any) -> Callable[[Path, Path], None]:
    """The same, and nothing in the line tells of it."""
    return edit(lambda said: [said.pop("line"), said.update(entries)])


def states_of(journal: Path) -> Path:
    return journal / "hidden-2.bin"  # in front of layer 2


def lines_of(journal: Path) -> Path:
    return journal / f"{SHARD}.jsonl"


def linked(path: Path, make: Callable[[Path, Path], None]) -> None:
    path.rename(path.parent.parent.parent / "elsewhere")
    make(path, path.parent.parent.parent / "elsewhere")


DAMAGES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "a byte of the weights": ("weight-only", lambda p, j: flip(p / SHARD, 20_000)),
    "a byte of the header": ("weight-only", lambda p, j: flip(p / SHARD, 100)),
    "a byte of finished weights": ("whole", lambda p, j: flip(p / SHARD, 20_000)),
    "a byte of a finished header": ("whole", lambda p, j: flip(p / SHARD, 100)),
    "finished weights cut": ("whole", lambda p, j: os.truncate(p / SHARD, 1000)),
    "the shard gone": ("weight-only", lambda p, j: (p / SHARD).unlink()),
    "the shard a directory": ("weight-only", lambda p, j: ((p / SHARD).unlink(), (p / SHARD).mkdir())),
    "the shard a link": ("weight-only", lambda p, j: linked(p / SHARD, Path.symlink_to)),
    "the shard a hard link": ("weight-only", lambda p, j: linked(p / SHARD, Path.hardlink_to)),
    "the shard a pipe": ("weight-only", lambda p, j: ((p / SHARD).unlink(), os.mkfifo(p / SHARD))),
    "states zeroed": ("calibrated", lambda p, j: states_of(j).write_bytes(bytes(states_of(j).stat().st_size))),
    "a bit of the states": ("calibrated", lambda p, j: flip(states_of(j), 500)),
    "states of other samples": ("calibrated", lambda p, j: states_of(j).write_bytes(states_of(j).read_bytes()[::-1])),
    "states of another layer": ("calibrated", lambda p, j: shutil.copy(j / "hidden-1.bin", states_of(j))),
    "states cut": ("calibrated", lambda p, j: os.truncate(states_of(j), 100)),
    "states gone": ("calibrated", lambda p, j: states_of(j).unlink()),
    "states a link": ("calibrated", lambda p, j: linked(states_of(j), Path.symlink_to)),
    "a step renamed": ("weight-only", unsigned(step="layer 1")),
    "a step of no plan": ("weight-only", unsigned(step="layer 99")),
    "a step that is a list": ("weight-only", unsigned(step=[1])),
    "num_tensors null": ("weight-only", unsigned(num_tensors=None)),
    "num_tensors text": ("weight-only", unsigned(num_tensors="3")),
    "num_tensors true": ("weight-only", unsigned(num_tensors=True)),
    "num_tensors negative": ("weight-only", unsigned(num_tensors=-1)),
    "num_tensors huge": ("weight-only", unsigned(num_tensors=10**9)),
    "end text": ("weight-only", unsigned(end="x")),
    "end a float": ("weight-only", unsigned(end=1e6)),
    "sha256 null": ("weight-only", unsigned(sha256=None)),
    "sha256 short": ("weight-only", unsigned(sha256="ab")),
    "sources null": ("weight-only", unsigned(sources=None)),
    "sources a list": ("weight-only", unsigned(sources=[1])),
    "sources of others": ("weight-only", unsigned(sources={"x": "0" * 64})),
    "sources altered": ("weight-only", edit(lambda said: said.update(sources=dict.fromkeys(said["sources"], "0" * 64)), line=4)),
    "states left out": ("calibrated", edit(lambda said: [said.pop("line"), said.pop("states")], line=-1)),
    "another key": ("weight-only", unsigned(more=1)),
    "deep JSON": ("weight-only", lambda p, j: lines_of(j).write_text("[" * 100_000 + "\n")),
    "not UTF-8": ("weight-only", lambda p, j: lines_of(j).write_bytes(b"\xff\xfe\n")),
    "lines twice": ("weight-only", lambda p, j: lines_of(j).write_text(lines_of(j).read_text() * 2)),
    "a middle line gone": ("weight-only", lambda p, j: lines_of(j).write_text("".join(lines_of(j).read_text().splitlines(True)[::2]))),
    "the journal a directory": ("weight-only", lambda p, j: (lines_of(j).unlink(), lines_of(j).mkdir())),
    "the journal a pipe": ("weight-only", lambda p, j: (lines_of(j).unlink(), os.mkfifo(lines_of(j)))),
    "run.json gone": ("weight-only", lambda p, j: (j / "run.json").unlink()),
    "run.json torn": ("weight-only", lambda p, j: (j / "run.json").write_text("{")),
    "run.json a list": ("weight-only", lambda p, j: (j / "run.json").write_text("[]")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_altered_is_not_gone_on_with(
    damage: str, stopped: dict[str, Path], small_bf16: Path, samples: Path, tmp_path: Path
) -> None:
    kind, alter = DAMAGES[damage]
    partial = shutil.copytree(stopped[kind], tmp_path / "out.partial")
    alter(partial, partial / JOURNAL_NAME)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"delete .*out\.partial to start over|out\.partial: .*delete it to start over") as caught:
        build(tmp_path / "out", KINDS.get(kind, KINDS["weight-only"]), small_bf16, samples, resume=True)
    assert "\n" not in str(caught.value)
    gone = set(before) - set(map(str, tmp_path.rglob("*")))
    assert all(Path(path).parent == partial and not path.endswith(".safetensors") for path in gone)  # files beside the weights, at most


@pytest.mark.parametrize("kind", ["calibrated", "weight-only", "whole"])
def test_what_is_whole_is_gone_on_with_to_the_same_bytes(
    kind: str, stopped: dict[str, Path], small_bf16: Path, samples: Path, tmp_path: Path
) -> None:
    recipe = KINDS.get(kind, KINDS["weight-only"])
    shutil.copytree(stopped[kind], tmp_path / "out.partial")
    build(tmp_path / "out", recipe, small_bf16, samples, resume=True)
    build(tmp_path / "once", recipe, small_bf16, samples)
    assert (tmp_path / "out" / SHARD).read_bytes() == (tmp_path / "once" / SHARD).read_bytes()


def test_the_hash_of_states_is_that_of_what_stands_on_the_disk(tmp_path: Path) -> None:
    import torch

    lengths, made = [3, 700, 5], []
    for members in ([0, 1, 2], [1], [0, 2]):
        states = DiskStates(tmp_path, lengths, 1024, members=members, hashed=True)
        for i, member in enumerate(members):
            generator = torch.Generator().manual_seed(member)
            states.put(i, torch.randn(1, lengths[member], 1024, generator=generator).bfloat16())
        states.advance()
        states.close()
        made.append(states.digests)
    assert made[0] == made[1] | made[2] and len(set(made[0].values())) == 3
    assert (tmp_path / "hidden-0.bin").stat().st_size == 2 * 1024 * sum(lengths)
