"""Places where an output cannot stand are refused before anything is done, and nothing is left there."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtpress.checkpoint.journal import JOURNAL_NAME
from mtpress.checkpoint.output_place import refuse_place
from mtpress.cli import main
from mtpress.errors import MtpressError

NOBODY = 65534


def tree(directory: Path) -> list[str]:
    return sorted(str(path) for path in directory.rglob("*"))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("source/out", "lies inside"),
        ("link-to-source/out", "lies inside"),
        ("source/deep/out", "lies inside"),
        ("dangling", "is a link to"),
        ("loop", "is a link to"),
        ("file", "exists already"),
        ("file/out", "is not a directory"),
        ("none/..", "is no name for a new directory"),
        ("x" * 250, "is too long a name"),
        ("x" * 300, "is too long a name"),
        ("/".join(["y" * 99] * 50), "is too long a name"),
        (os.fsdecode(b"bad\xff\xfe"), "is not UTF-8"),
        ("a\0b", "is no name for a new directory"),
        ("taken", "was not made by mtpress; move it"),
        ("linked", "has the name that|is a link, and mtpress would write there"),
        ("named", "has the name that"),
        ("holder", "has the name that"),
        ("/dev/null", "exists already"),
        ("/", "is no name for a new directory"),
        ("", "is no name for a new directory"),
    ],
)
def test_refused(out: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    source.mkdir()
    for name, target in {"link-to-source": "source", "dangling": "gone/x", "loop": "loop", "linked.partial": "source"}.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "file").write_text("x")
    (tmp_path / "taken.partial").mkdir()
    (tmp_path / "named.partial" / JOURNAL_NAME).mkdir(parents=True)  # a source, and once left by mtpress
    (tmp_path / "holder.partial" / JOURNAL_NAME).mkdir(parents=True)
    (tmp_path / "holder.partial" / "source").mkdir()
    before = tree(tmp_path)
    with pytest.raises(MtpressError, match=said) as caught:
        refuse_place(Path(out), [source, tmp_path / "named.partial", tmp_path / "holder.partial/source", "Org/on-the-hub"])
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "begun.partial" / JOURNAL_NAME).mkdir(parents=True)
    refuse_place(tmp_path / "there", finished=True)
    refuse_place(tmp_path / "begun")
    refuse_place(tmp_path / "new/and/deep", ["Org/on-the-hub", tmp_path / "there"])
    refuse_place(tmp_path / "ünïcödé 模型")
    assert tree(tmp_path) == [str(tmp_path / name) for name in ("begun.partial", f"begun.partial/{JOURNAL_NAME}", "there")]


@pytest.mark.parametrize("stage", ["quantize", "repair", "graft", "convert"])
def test_every_stage_refuses_before_it_opens_anything(
    stage: str, small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = str(small_nvfp4["nvfp4-mtp-vlm"])
    source = shutil.copytree(small_bf16 if stage == "quantize" else made, tmp_path / "out.partial")
    (source / JOURNAL_NAME).mkdir()  # it even looks as if mtpress had left it
    (tmp_path / "dangling").symlink_to("gone")
    before = tree(tmp_path)
    more = {
        "quantize": ["--recipe", "nvfp4-mtp-vlm", "--weight-only", "0.01"],
        "graft": ["--from", str(small_bf16)],
        "convert": ["--text-only"],
    }
    for out, said in (("out", "has the name that"), ("out.partial/within", "lies inside"), ("dangling", "is a link to gone")):
        assert main([stage, str(source), str(tmp_path / out), *more.get(stage, [])]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0]
    assert tree(tmp_path) == before


# ---- as a user who may not do everything

CALLS = """
import contextlib, io, json, sys
from mtpress.cli import main
for arguments in json.loads(sys.argv[1]):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except BaseException as error:
            code = repr(error)
    print(json.dumps([code, err.getvalue()]))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
        Path(made).chmod(0o755)
        yield Path(made)


def as_nobody(calls: list[list[str]], place: Path) -> list[tuple[Any, str]]:
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("needs setpriv, to be another user")
    environment = {**os.environ, "HOME": "/nonexistent", "TMPDIR": str(place / "mine"), "HF_HUB_OFFLINE": "1"}
    command = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", sys.executable, "-B", "-c"]
    if subprocess.run([*command, "import mtpress.cli"], capture_output=True).returncode:
        pytest.skip("another user may not run this Python")
    done = subprocess.run([*command, CALLS, json.dumps(calls)], capture_output=True, text=True, cwd=place / "mine", env=environment)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to be another user")
def test_what_a_user_may_not_do_is_one_line(small_nvfp4: dict[str, Path], small_bf16: Path, place: Path) -> None:
    made = shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], place / "made")
    base = shutil.copytree(small_bf16, place / "base")
    mine, readonly, private = place / "mine", place / "readonly", place / "private"
    for directory in (mine, readonly, private):
        directory.mkdir()
    os.chown(mine, NOBODY, NOBODY)
    shutil.copytree(made, private / "made")
    private.chmod(0o700)
    outs = (str(mine / f"o{number}") for number in itertools.count())
    calls = [[stage, str(private / "made")] for stage in ("check", "inspect")]
    calls += [["serve", str(private / "made"), "--dry-run", "--profile", "rtx-5090"], ["repair", str(private / "made"), next(outs)]]
    calls += [["graft", str(private / "made"), next(outs), "--from", str(base)], ["check", str(made), "--base", str(private / "made")]]
    calls += [["graft", str(made), next(outs), "--from", str(private / "made")]]
    calls += [["repair", str(made), str(out)] for out in (readonly / "o", private / "o")]
    for file in sorted(path.name for path in made.iterdir()):
        locked = shutil.copytree(made, place / f"locked-{file}")
        (locked / file).chmod(0)
        calls += [["check", str(locked), "--hashes"], ["repair", str(locked), next(outs)]]
        calls += [["serve", str(locked), "--dry-run", "--profile", "rtx-5090"]]
    for mode in (0o744, 0o711):
        locked = shutil.copytree(made, place / f"mode-{mode:o}")
        locked.chmod(mode)
        calls += [["check", str(locked)], ["repair", str(locked), next(outs)]]
    (mine / "held.partial" / JOURNAL_NAME).mkdir(parents=True)
    (mine / "held.partial" / JOURNAL_NAME / "lock").touch(0)
    for path in (mine / "held.partial", mine / "held.partial" / JOURNAL_NAME):
        os.chown(path, NOBODY, NOBODY)
    calls.append(["convert", str(made), str(mine / "held"), "--text-only"])
    for arguments, (code, said) in zip(calls, as_nobody(calls, place), strict=True):
        shown = f"{arguments}\n{code} {said}"
        assert code in (0, 1, 2), shown
        assert "Traceback" not in said and (code != 2 or len(said.splitlines()) == 1), shown
        assert "free space" not in said and "only safetensors checkpoints" not in said, shown  # neither is what is wrong
        assert code != 2 or arguments[0] in ("check", "serve") or not (arguments[2:] and Path(arguments[2]).exists()), shown
    assert not [path for path in mine.iterdir() if path.name.endswith(".partial") and path.name != "held.partial"]
    assert not list(readonly.iterdir()) and [path.name for path in private.iterdir()] == ["made"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to be another user")
def test_files_that_a_user_may_not_link_are_copied(small_nvfp4: dict[str, Path], place: Path) -> None:
    made = shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], place / "made")
    config = (made / "config.json").read_text()
    (made / "config.json").write_text(config.replace("Qwen3_5ForConditionalGeneration", "X"))
    (place / "mine").mkdir()
    os.chown(place / "mine", NOBODY, NOBODY)
    [(code, said)] = as_nobody([["repair", str(made), str(place / "mine/o")]], place)
    assert code == 0, said
    shard = next((place / "mine/o").glob("*.safetensors"))
    record = json.loads((place / "mine/o/mtpress.json").read_text())
    protected = Path("/proc/sys/fs/protected_hardlinks")
    if protected.exists() and protected.read_text().strip() == "1":
        assert record["hard_links"] == [] and shard.stat().st_nlink == 1
    else:
        assert record["hard_links"] == [shard.name]
