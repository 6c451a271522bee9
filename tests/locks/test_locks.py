"""Every lock is a full freeze: exact versions, nothing local, nothing that names an index; make_env refuses an unknown name."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

LOCKS = Path(__file__).resolve().parents[2] / "locks"
PINNED = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.!]*")


@pytest.mark.parametrize("lock", sorted(path.name for path in LOCKS.glob("*.txt")))
def test_every_line_is_an_exact_public_version(lock: str) -> None:
    lines = [line for line in (LOCKS / lock).read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not PINNED.fullmatch(line)] == []
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines]
    assert len(set(names)) == len(names)
    assert "setuptools" in names, "the project is installed without build isolation"


def test_an_unknown_lock_is_refused_in_one_line() -> None:
    done = subprocess.run([sys.executable, str(LOCKS / "make_env.py"), "nowhere"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "no such lock file; there are: " in done.stderr
