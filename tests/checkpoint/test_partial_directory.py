"""Who makes, takes over and removes OUT.partial, with other runs held at every point between a look and a lock."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtpress.checkpoint.journal import JOURNAL_NAME, Journal
from mtpress.checkpoint.partial_directory import PartialDirectory
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.errors import InputError, ResourceError

SHARD = "model.safetensors"
PLANNED = {SHARD: [OutputTensor("a", "U8", (4,))]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def writer_of(out: Path) -> CheckpointWriter:
    return CheckpointWriter(out, PLANNED, {})


def finish(writer: CheckpointWriter) -> None:
    writer.write("a", torch.arange(4, dtype=torch.uint8))
    writer.wait()
    writer.finish()


def whole(out: Path) -> bool:
    return load_file(out / SHARD)["a"].tolist() == [0, 1, 2, 3] and [path.name for path in out.parent.iterdir()] == [out.name]


def once(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, act: Callable[[], object]) -> None:
    """`act` is called in front of the next call of a method: whoever makes it is held there for so long."""
    original = getattr(owner, name)

    def held(self: object, *rest: object) -> object:
        monkeypatch.setattr(owner, name, original)
        act()
        return original(self, *rest)

    monkeypatch.setattr(owner, name, held)


def refused(out: Path) -> str:
    """What a run says that may not enter."""
    with pytest.raises((InputError, ResourceError)) as caught, writer_of(out):
        pytest.fail("two runs in one directory")
    return str(caught.value)


def test_a_run_held_at_the_lock_while_the_other_ends(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer_of(out) as winner:
        once(monkeypatch, Journal, "lock", lambda: finish(winner))
        assert "exists already" in refused(out)
    assert whole(out)


def test_a_run_held_at_the_lock_while_the_other_gives_up(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError), writer_of(out) as loser:
        once(monkeypatch, Journal, "lock", lambda: loser.__exit__(RuntimeError, RuntimeError(), None))
        with writer_of(out) as winner:
            assert winner.lock.is_held() and not loser.lock.is_held()
            finish(winner)
        raise RuntimeError  # its clean-up comes again, and late
    assert whole(out)


def test_a_run_held_while_it_makes_the_directory(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    winner = writer_of(out)
    once(monkeypatch, PartialDirectory, "_nameless", winner.__enter__)
    assert "another mtpress is writing there" in refused(out)
    assert sorted(path.name for path in winner.partial.iterdir()) == [JOURNAL_NAME]
    finish(winner)
    winner.__exit__(None, None, None)
    assert whole(out)


def test_a_run_that_comes_while_another_cleans_up(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with pytest.raises(RuntimeError), writer_of(out):
        once(monkeypatch, PartialDirectory, "_nameless", lambda: said.append(refused(out)))
        raise RuntimeError
    assert len(said) == 1 and "another mtpress is writing there" in said[0]
    assert list(out.parent.iterdir()) == []


def test_a_run_whose_directory_was_taken_away_touches_nothing_of_the_next(out: Path) -> None:
    with writer_of(out) as first:
        first.write("a", torch.zeros(4, dtype=torch.uint8))
        first.wait()
        first.partial.rename(out.with_name("elsewhere"))
        with writer_of(out) as second:
            with pytest.raises(ResourceError, match="was moved or removed while it was written"):
                first.finish()
            first.place.remove()
            finish(second)
    assert load_file(out / SHARD)["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["link to one of mtpress", "dangling link", "file", "pipe", "directory of someone", "link as its mark"])
def test_what_is_not_a_directory_of_mtpress_is_left_as_it_is(kind: str, out: Path, tmp_path: Path) -> None:
    partial, there = out.with_name("out.partial"), tmp_path / "there"
    (there / JOURNAL_NAME).mkdir(parents=True)
    (there / "precious").write_text("x")
    if kind.endswith("link") or kind.startswith("link to"):
        partial.symlink_to(there if kind.startswith("link to") else tmp_path / "gone")
    elif kind == "file":
        partial.write_text("x")
    elif kind == "pipe":
        os.mkfifo(partial)
    else:
        partial.mkdir()
        (partial / "precious").write_text("x")
        if kind == "link as its mark":
            (partial / JOURNAL_NAME).symlink_to(there / JOURNAL_NAME)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    message = refused(out)
    assert "remove it or choose another OUT" in message or "was not made by mtpress; move it" in message
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_directory_that_appears_under_the_outputs_name_is_not_replaced(out: Path) -> None:
    with pytest.raises(ResourceError, match="was made by someone else meanwhile"), writer_of(out) as writer:
        writer.write("a", torch.arange(4, dtype=torch.uint8))
        writer.wait()
        out.mkdir()
        writer.finish()
    assert list(out.iterdir()) == []
