"""What the benchmarks share: commands with their time and peak memory, cold caches, calibration text, tables and JSON.

In: a command, a directory, what was found. Out: seconds, bytes, a table on stdout and a file under build/.
"""

import argparse
import json
import os
import platform
import random
import string
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SAMPLING_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """One command: its wall time and the largest resident memory of the process and all below it, in bytes."""

    seconds: float
    peak_bytes: int
    stdout: str


def measured(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Runs a command to its end; a failure shows its stderr and stops the benchmark."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        whole = psutil.Process(process.pid)
        while not done.wait(SAMPLING_SECONDS):
            try:
                peak = max(peak, sum(p.memory_info().rss for p in [whole, *whole.children(recursive=True)]))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    output, errors = process.communicate()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{errors[-3000:]}")
    return Run(seconds, peak, output)


def mtpress(*arguments: object, threads: int | None = None) -> Run:
    """One mtpress command with --json, in a process of its own."""
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else None
    return measured([sys.executable, "-m", "mtpress", *map(str, arguments), "--json"], environment)


def record(out: Path) -> dict[str, Any]:
    """mtpress.json of a finished output."""
    found: dict[str, Any] = json.loads((out / "mtpress.json").read_text(encoding="utf-8"))
    return found


def make_cold(directory: Path) -> None:
    """Takes the files of a directory out of the page cache."""
    for path in directory.iterdir():
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def write_calibration(path: Path, samples: int, tokens: int) -> Path:
    """JSON lines of random words, each surely longer than `tokens` tokens: cut there by max_seq_len all are of that length."""
    rng = random.Random(0)
    words = ("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in iter(int, 1))
    with path.open("w", encoding="utf-8") as file:
        for _ in range(samples):
            file.write(json.dumps({"text": " ".join(next(words) for _ in range(2 * tokens))}) + "\n")
    return path


def write_recipe(path: Path, name: str, samples: int, tokens: int) -> Path:
    """A shipped recipe with this much calibration."""
    import yaml

    from mtpress.plan.recipe import load_recipe

    content = load_recipe(name).canonical()
    content["calibration"] |= {"num_samples": samples, "max_seq_len": tokens}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def machine() -> str:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return f"{platform.machine()} {model}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def options(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(f"build/{name}.json"))
    return parser


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Markdown, so that it can be put into the docs as it is."""
    print(f"| {' | '.join(headings)} |\n|{'|'.join('---' for _ in headings)}|")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in row)} |")


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n", encoding="utf-8")
