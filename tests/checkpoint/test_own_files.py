"""Files that a checkpoint may hand on, and links, pipes and devices that no stage copies."""

import os
import shutil
import socket
from pathlib import Path

import pytest

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.own_files import own_file, refuse_foreign_files
from mtpress.cli import main
from mtpress.errors import InputError

BLOB = "ab" * 32


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("PRIVATE KEY")
    return path


@pytest.fixture
def checkpoint(small_nvfp4: dict[str, Path], tmp_path: Path) -> Path:
    """One that repair has something to do on."""
    copied = shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "checkpoint")
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config.replace("Qwen3_5ForConditionalGeneration", "X"))
    return copied


def place(kind: str, path: Path, secret: Path) -> None:
    """Puts something at `path` that is not a checkpoint's to hand on."""
    path.parent.mkdir(exist_ok=True)
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "relative link":
        path.symlink_to(os.path.relpath(secret, path.parent))
    elif kind == "link by a link":
        (path.parent / "between").symlink_to(secret)
        path.symlink_to("between")
    elif kind == "environment":
        path.symlink_to("/proc/self/environ")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.symlink_to(secret.parent)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as bound, pytest.MonkeyPatch.context() as patch:
            patch.chdir(path.parent)
            bound.bind(path.name)


KINDS = ("link", "relative link", "link by a link", "environment", "device", "directory", "loop", "pipe", "socket")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["NOTICE.txt", "sub/x.txt"])
def test_what_is_not_its_own_is_not_handed_on(
    kind: str, name: str, checkpoint: Path, secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place(kind, checkpoint / name, secret)
    assert main(["repair", str(checkpoint), str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(checkpoint / Path(name).parent) in lines[0]
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_every_stage_that_copies_refuses_it(
    kind: str, small_bf16: Path, small_nvfp4: dict[str, Path], secret: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "made")
    plain = shutil.copytree(small_bf16, tmp_path / "plain")
    for directory in (made, plain):
        place(kind, directory / "NOTICE", secret)
    out = str(tmp_path / "out")
    for command in (
        ["quantize", str(plain), out, "--recipe", "nvfp4-mtp-vlm", "--weight-only", "0.01"],
        ["convert", str(made), out, "--text-only"],
    ):
        assert main(command) == 2
        assert "NOTICE: is " in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("stage", ["repair", "convert", "quantize"])
def test_a_shard_that_is_elsewhere_is_not_linked(
    stage: str, checkpoint: Path, small_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(small_bf16, tmp_path / "plain") if stage == "quantize" else checkpoint
    shard = sorted(source.glob("*.safetensors"))[-1]
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    more = {"convert": ["--text-only"], "quantize": ["--recipe", "nvfp4-mtp-vlm", "--weight-only", "0.01"]}.get(stage, [])
    assert main([stage, str(source), str(tmp_path / "out"), *more]) == 2
    assert "outside the checkpoint; put the file itself in its place" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*")) and (tmp_path / "elsewhere.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_no_reader_waits_for_what_is_no_file(kind: str, checkpoint: Path, secret: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("extra.safetensors", "chat_template.jinja", "generation_config.json", "mtpress.json", "merges.txt"):
        (checkpoint / name).unlink(missing_ok=True)
        place(kind, checkpoint / name, secret)
        assert main(["check", str(checkpoint)]) in (1, 2)
        assert main(["repair", str(checkpoint), str(checkpoint.parent / "out")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        (checkpoint / name).unlink()


def test_links_inside_and_the_hub_s_blobs_are_its_own(tmp_path: Path, secret: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0a1b", tmp_path / "models--a--b/blobs"
    (snapshot / "sub").mkdir(parents=True)
    blobs.mkdir()
    (blobs / BLOB).write_text("weights")
    (snapshot / "a").symlink_to(f"../../blobs/{BLOB}")
    (snapshot / "sub/b").symlink_to(f"../../../blobs/{BLOB}")
    (snapshot / "c").symlink_to("a")
    refuse_foreign_files(snapshot)
    assert {own_file(snapshot, snapshot / name) for name in ("a", "sub/b", "c")} == {blobs / BLOB}
    assert own_file(snapshot / "sub", snapshot / "sub/b") == blobs / BLOB
    for target in ("../../blobs/notes.txt", "../../../models--c--d/blobs/" + BLOB, "../../refs/main"):
        path = snapshot / "other"
        real = Path(os.path.normpath(snapshot / target))
        real.parent.mkdir(parents=True, exist_ok=True)
        real.write_text("x")
        path.symlink_to(target)
        with pytest.raises(InputError, match="outside the checkpoint"):
            refuse_foreign_files(snapshot)
        path.unlink()
    (blobs / BLOB).unlink()
    (blobs / BLOB).symlink_to(secret)  # a cache that somebody made
    with pytest.raises(InputError, match="outside the checkpoint"):
        own_file(snapshot, snapshot / "a")


def test_a_link_to_the_whole_directory_is_the_directory(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "by-another-name").symlink_to(checkpoint)
    refuse_foreign_files(tmp_path / "by-another-name")
    assert Checkpoint.open_stored(tmp_path / "by-another-name").tensors
