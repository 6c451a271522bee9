"""The engine's torchvision imports, in the process itself and in those it starts, and costs nothing until it is asked for."""

import subprocess
import sys
from pathlib import Path

import pytest


def run(python: Path | str, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.engine
def test_torchvision_imports_beside_a_cpu_torch(engine_python: Path) -> None:
    code = "import torch, torchvision.transforms.v2, torchvision.ops; print(torch.version.cuda, hasattr(torch.ops.torchvision, 'nms'))"
    assert run(engine_python, code) == "None True"


@pytest.mark.engine
def test_a_child_process_has_the_hook_without_importing_torch(engine_python: Path) -> None:
    code = "import sys; print(any(f.__module__ == 'mtpress.engine.plugins.torchvision_ops' for f in sys.meta_path), 'torch' in sys.modules)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    assert run(engine_python, child) == "True False"


def test_installing_twice_watches_once() -> None:
    code = (
        "import sys; from mtpress.engine.plugins.torchvision_ops import install; before = len(sys.meta_path);"
        "install(); install(); print(len(sys.meta_path) - before)"
    )
    assert run(sys.executable, code) == "1"


@pytest.mark.parametrize("module", ["torchvision_ops", "nvfp4_cpu", "probe"])
def test_importing_the_module_imports_no_engine(module: str) -> None:
    code = f"import sys, mtpress.engine.plugins.{module}; print(sorted({{'torch', 'vllm', 'transformers', 'pydantic'}} & set(sys.modules)))"
    assert run(sys.executable, code) == "[]"
