import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.source_guard import SourceGuard
from mtpress.errors import InputError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    save_file({"a": torch.arange(8.0)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def guard(source: Path) -> SourceGuard:
    return SourceGuard(Checkpoint.open(source))


def test_a_source_that_stays_as_it_is(source: Path, guard: SourceGuard) -> None:
    guard.look([source / "model.safetensors"])
    guard.look_closely()
    content = (source / "model.safetensors").read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    assert guard.fingerprints() == {
        "model.safetensors": {
            "size": len(content),
            "mtime_ns": (source / "model.safetensors").stat().st_mtime_ns,
            "header_sha256": hashlib.sha256(header).hexdigest(),
        }
    }


@pytest.mark.parametrize("closely", [False, True])
@pytest.mark.parametrize("change", ["size", "modification time", "gone"])
def test_a_change_is_named(change: str, closely: bool, source: Path, guard: SourceGuard) -> None:
    file = source / "model.safetensors"
    kept = file.stat()
    if change == "size":
        with file.open("ab") as opened:
            opened.write(b"x")
        os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    elif change == "gone":
        file.unlink()
    else:
        os.utime(file, ns=(1, 1))
    why = (
        "cannot be read .*; it was there when the run began" if change == "gone" else f"its {change} changed while it was read; start over"
    )
    with pytest.raises(InputError, match=rf"model\.safetensors: {why}"):
        guard.look_closely() if closely else guard.look([file])


def test_only_the_files_asked_for_are_looked_at(source: Path, guard: SourceGuard) -> None:
    os.utime(source / "model.safetensors", ns=(1, 1))
    guard.look([])


def test_a_header_that_changed_behind_the_same_size_and_time(source: Path, guard: SourceGuard) -> None:
    file = source / "model.safetensors"
    kept, content = file.stat(), bytearray(file.read_bytes())
    content[content.index(b'"a"') + 1] = ord("b")
    file.write_bytes(content)
    os.utime(file, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    guard.look([file])
    with pytest.raises(InputError, match=r"model\.safetensors: its header changed while it was read"):
        guard.look_closely()
