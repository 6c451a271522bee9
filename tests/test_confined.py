"""The process for what strangers wrote: answers, limits, and that nothing of it stays."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtpress.confined import Confined, TooLargeError, TooLongError

HOSTILE = """
import os, sys, time
def answer(request):
    print("noise")
    if request == "raise": raise ValueError("no\\nsecond line")
    if request == "exit": os._exit(3)
    if request == "loop":
        while True: pass
    if request == "C": 9 ** 9 ** 9
    if request == "memory": bytearray(10 ** 10)
    if request == "long": return "x" * (80 << 20)
    if request == "pid": return os.getpid()
    return request
"""


@pytest.fixture
def confined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Confined:
    (tmp_path / "hostile_answers.py").write_text(HOSTILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Confined("hostile_answers", 300_000_000)


def test_it_answers_and_goes_on(confined: Confined) -> None:
    assert confined.ask({"a": ["ö\ud800"]}, 10) == {"a": ["ö\ud800"]}
    first = confined.ask("pid", 10)
    with pytest.raises(ValueError, match=r"^no$"):
        confined.ask("raise", 10)
    assert confined.ask("pid", 10) == first


@pytest.mark.parametrize(
    ("request_", "error", "seconds"),
    [
        ("loop", TooLongError, 0.5),
        ("C", TooLongError, 0.5),
        ("memory", TooLargeError, 20),
        ("exit", TooLargeError, 20),
        ("long", TooLargeError, 20),
    ],
)
def test_limits(request_: str, error: type[Exception], seconds: float, confined: Confined) -> None:
    with pytest.raises(error):
        confined.ask(request_, seconds)
    assert confined.ask("x", 10) == "x"


def test_nothing_is_left_when_mtpress_is_gone(confined: Confined) -> None:
    code = (
        "import sys, threading, os, time\nfrom mtpress.confined import Confined\nc = Confined('hostile_answers', 300_000_000)\n"
        "print(c.ask('pid', 20), flush=True)\nthreading.Thread(target=lambda: c.ask('loop', 1), daemon=True).start()\n"
        "time.sleep(0.5)\nos._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    child = int(done.stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
        if Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            break
    else:
        assert not Path(f"/proc/{child}").exists()
    assert os.getpid() != child
