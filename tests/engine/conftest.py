"""The engine's own python, the probe run under it, and the checkpoint that the tests start from."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILTIN_MODEL = ROOT / "src/mtpress/builtin/mtpress-tiny"
PROBE_TIMEOUT_SECONDS = 600  # a start takes 20 s of one core; this leaves room for a busy machine

Probe = Callable[[Path, dict[str, Any], Path], dict[str, Any]]


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The python of .envs/engine, made by locks/make_env.py where it is not there yet."""
    made = subprocess.run([sys.executable, str(ROOT / "locks/make_env.py"), "engine"], capture_output=True, text=True)
    if made.returncode:
        pytest.fail(f"locks/make_env.py engine failed:\n{made.stderr[-3000:]}")
    return Path(made.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def probe(engine_python: Path) -> Probe:
    """probe(checkpoint, request, folder): the result of mtpress.engine.probe; image paths are relative to folder, where request
    and result stay."""

    def run(checkpoint: Path, request: dict[str, Any], folder: Path) -> dict[str, Any]:
        name = f"{checkpoint.name}-mtp{request.get('mtp', 0)}"
        asked, answered = folder / f"{name}.request.json", folder / f"{name}.result.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [str(engine_python), "-m", "mtpress.engine.probe", str(checkpoint), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_SECONDS)
        assert done.returncode == 0, f"vLLM on {checkpoint}:\n{done.stderr[-4000:]}"
        return json.loads(answered.read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="session")
def bf16_model() -> Path:
    """The built-in model, or the BF16 checkpoint that MTPRESS_TEST_MODEL names."""
    path = Path(os.environ.get("MTPRESS_TEST_MODEL", BUILTIN_MODEL))
    if not (path / "config.json").is_file():
        pytest.fail(f"{path} holds no checkpoint; set MTPRESS_TEST_MODEL to a BF16 one")
    return path
