"""The engine's own python, the probe run under it, and the checkpoint that the tests start from."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from acceptance import Probe, Runs, run_probe

ROOT = Path(__file__).resolve().parents[2]
BUILTIN_MODEL = ROOT / "src/mtpress/builtin/mtpress-tiny"


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The python of .envs/engine, made by locks/make_env.py where it is not there yet."""
    made = subprocess.run([sys.executable, str(ROOT / "locks/make_env.py"), "engine"], capture_output=True, text=True)
    if made.returncode:
        pytest.fail(f"locks/make_env.py engine failed:\n{made.stderr[-3000:]}")
    return Path(made.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def probe(engine_python: Path) -> Probe:
    """probe(checkpoint, request, folder): the result of mtpress.engine.plugins.probe; image paths are relative to folder, where request
    and result stay."""

    return partial(run_probe, engine_python)


@pytest.fixture(scope="session")
def bf16_model() -> Path:
    """The built-in model, or the BF16 checkpoint that MTPRESS_TEST_MODEL names."""
    path = Path(os.environ.get("MTPRESS_TEST_MODEL", BUILTIN_MODEL))
    if not (path / "config.json").is_file():
        pytest.fail(f"{path} holds no checkpoint; set MTPRESS_TEST_MODEL to a BF16 one")
    return path


@pytest.fixture(scope="session")
def runs(probe: Probe, bf16_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What checkpoints answer in the real vLLM; the BF16 run is made once for all test processes of a session."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "acceptance"
    shared.mkdir(exist_ok=True)
    return Runs(probe, bf16_model, tmp_path_factory.mktemp("acceptance-runs"), shared)
