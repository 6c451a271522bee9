"""The command as a process: its first moments, and streams that are closed or full."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtpress.errors import MtpressError, of_the_machine

COMMAND = f"{sys.executable} -m mtpress"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("module", ["mtpress.cli", "argparse", "importlib.metadata"])
def test_ctrl_c_in_the_first_moments_is_silent(module: str) -> None:
    """It comes while a module is imported, before there is a command line that could answer."""
    code = f"""
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mtpress.start import entry
original = builtins.__import__
def held(name, *rest, **more):
    if name in ({module!r}, "mtpress") and not hasattr(builtins, "done"):
        builtins.done = True
        os.kill(os.getpid(), signal.SIGINT)
    return original(name, *rest, **more)
builtins.__import__ = held
sys.argv = ["mtpress", "recipes"]
entry()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")


@pytest.mark.parametrize("stage", ["check CKPT", "check CKPT --json", "recipes", "recipes --json", "inspect CKPT", "--version"])
def test_a_full_stdout_is_one_line(stage: str, small_bf16: Path) -> None:
    done = shell(f"{COMMAND} {stage.replace('CKPT', str(small_bf16))} > /dev/full")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and "stdout cannot be written (No space left on device)" in lines[0]


def test_closed_streams(small_bf16: Path, tmp_path: Path) -> None:
    """No file gets the number of a stream, where a message would be written into it."""
    done = shell(f"{COMMAND} check {small_bf16} >&-")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and "stdout is closed" in done.stderr
    done = shell(f"{COMMAND} check {small_bf16} --json 2>&- <&-")
    assert done.returncode == 0 and json.loads(done.stdout)["sound"]
    assert shell(f"{COMMAND} check {tmp_path}/none 2>&-").returncode == 2
    assert shell(f"{COMMAND} check {tmp_path}/none >&- 2>&-").returncode == 2


def test_a_reader_that_leaves_is_no_failure(small_bf16: Path) -> None:
    done = shell(f"{COMMAND} inspect {small_bf16} --json | head -c 1")
    assert (done.stdout, done.stderr) == ("{", "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b: Permission denied; this user may not"),
        (OSError(36, "File name too long", "x" * 300), "name a shorter path"),
        (OSError(28, "No space left on device"), "No space left on device; free space"),
        (FileNotFoundError(2, "No usable temporary directory found in ['/x']"), "set TMPDIR to a directory that can be written"),
        (MemoryError(), "not enough memory (an allocation failed)"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (RuntimeError("can't start new thread"), "not enough memory"),
        (UnicodeEncodeError("utf-8", "a\udcffb", 1, 2, "surrogates not allowed"), "is not UTF-8; rename it"),
        (OSError("no number: a bug of ours, or of a library"), None),
        (RuntimeError("a bug"), None),
        (ValueError("a bug"), None),
    ],
)
def test_what_the_system_refuses_has_words(error: Exception, said: str | None) -> None:
    found = of_the_machine(error)
    if said is None:
        assert found is None
    else:
        assert found is not None and said in found and "\n" not in found
    assert not isinstance(error, MtpressError)
