"""Makes a pinned environment from a lock file, once: .envs/NAME, made anew only when locks/NAME.txt has changed.

    python locks/make_env.py NAME      prints the path of its python as the last line

Every package stands in the lock with its exact version, so pip resolves nothing (--no-deps). The project itself is
installed editable, without its dependencies, so that engines find its plugins.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCHVISION_HOOK = "import mtpress.engine.torchvision_ops; mtpress.engine.torchvision_ops.install()\n"


def make_env(name: str) -> Path:
    lock = ROOT / "locks" / f"{name}.txt"
    env = ROOT / ".envs" / name
    python = env / "bin" / "python"
    stamp = env / "lock.sha256"
    digest = hashlib.sha256(lock.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    print(f"making .envs/{name} from locks/{name}.txt", file=sys.stderr, flush=True)
    shutil.rmtree(env, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "-r", str(lock)], check=True)
    subprocess.run([*pip, "--no-build-isolation", "-e", str(ROOT)], check=True)
    if "\ntorchvision==" in lock.read_text():
        site = next(env.glob("lib/python3*/site-packages"))
        (site / "mtpress_torchvision_ops.pth").write_text(TORCHVISION_HOOK)
    stamp.write_text(digest)
    return python


if __name__ == "__main__":
    print(make_env(sys.argv[1]))
