"""Runs that are spread over worker processes: the bytes of one process, whoever is killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.writer import CheckpointWriter, split_into_shards
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import Recipe, load_recipe
from mtpress.quantization.worker_pool import ProcessWorker, WorkerPool
from mtpress.stages.quantize import quantize

CALIBRATED = load_recipe("nvfp4-mtp-vlm")
WEIGHT_ONLY = CALIBRATED.model_copy(update={"constant_input_scale": 0.01})
SHARD_BYTES = 700_000  # eight shards of the built-in model
COMMAND = ("quantize", str(BUILTIN_MODEL), "--recipe", "nvfp4-mtp-vlm")


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the record, whose timings differ."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.is_file() and p.name != "mtpress.json"}


def record(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "mtpress.json").read_text())
    return content


def build(out: Path, recipe: Recipe, workers: int, *, calibration: str = "builtin", resume: bool = False) -> Path:
    quantize(BUILTIN_MODEL, out, recipe, calibration=[calibration], workers=workers, resume=resume, silent=True)
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the built-in calibration set."""
    return build(tmp_path_factory.mktemp("alone") / "out", CALIBRATED, 1)


@pytest.fixture
def many_shards(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Small shards here and in the workers, which are Pythons of their own and run a sitecustomize that they find."""
    directory = tmp_path_factory.mktemp("site")
    lines = f"import mtpress.checkpoint.writer\nmtpress.checkpoint.writer.split_into_shards.__defaults__ = ({SHARD_BYTES},)\n"
    (directory / "sitecustomize.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)
    monkeypatch.setattr(split_into_shards, "__defaults__", (SHARD_BYTES,))


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Fill it with (method, n): the worker that gets the n-th call of that method is killed with it."""
    wanted: list[Any] = []
    original, calls = ProcessWorker.call, 0

    def call(self: ProcessWorker, method: str, *arguments: Any) -> None:
        nonlocal calls
        calls += bool(wanted) and method == wanted[0]
        if wanted and method == wanted[0] and calls == wanted[1]:
            self.process.kill()
            self.process.wait()
        original(self, method, *arguments)

    monkeypatch.setattr(ProcessWorker, "call", call)
    yield wanted


def test_two_workers_write_the_bytes_of_one(alone: Path, tmp_path: Path) -> None:
    out = build(tmp_path / "out", CALIBRATED, 2)
    assert hashes(out) == hashes(alone)
    told = record(out)
    assert told["workers"]["count"] == 2 and not told["workers"]["ray"]
    assert all(memory > 50_000_000 for memory in told["workers"]["peak_memory_bytes"])
    assert told["source"] == record(alone)["source"]
    assert "workers" not in record(alone)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_worker_may_have_no_samples(tmp_path: Path) -> None:
    rows = [{"text": "Mia lives in Brook and feeds the ducks."}, {"text": "Tom paints."}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, three = (build(tmp_path / str(n), CALIBRATED, n, calibration=str(tmp_path / "two.jsonl")) for n in (1, 3))
    assert hashes(three) == hashes(one)
    assert record(three)["workers"]["count"] == 3


@pytest.mark.parametrize("rounding", ["search", "rtn"])
def test_int4_shards_are_dealt_out(rounding: str, many_shards: None, tmp_path: Path) -> None:
    recipe = load_recipe("int4-mtp-vlm").model_copy(update={"rounding": rounding})
    one, two = (build(tmp_path / str(n), recipe, n) for n in (1, 2))
    assert len(list(one.glob("*.safetensors"))) == 6
    assert hashes(two) == hashes(one)
    assert record(two)["source"] == record(one)["source"]


def test_weight_only_shards_are_dealt_out(many_shards: None, tmp_path: Path) -> None:
    one, two, three = (build(tmp_path / str(n), WEIGHT_ONLY, n) for n in (1, 2, 3))
    assert len(list(one.glob("*.safetensors"))) == 8
    assert hashes(two) == hashes(one)
    assert hashes(three) == hashes(one)
    assert record(two)["output_sha256"] == record(one)["output_sha256"]
    assert record(two)["source"] == record(one)["source"]  # the digests of what the workers have read among it


def test_a_killed_worker_ends_the_run_and_one_process_goes_on(
    kill_at: list[Any], alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = psutil.Process().children()
    kill_at[:] = ["layer", 6]  # of two workers: the second, in front of layer 2
    out = tmp_path / "out"
    assert main([*COMMAND, str(out), "--calibration", "builtin", "--workers", "2"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("quantize ")]
    assert len(lines) == 1
    assert lines[0].startswith("mtpress quantize: a worker process was killed by signal 9; is there memory for as many?")
    assert "finished steps are kept in" in lines[0] and "--resume goes on there" in lines[0]
    assert not out.exists()
    assert psutil.Process().children() == before
    kill_at.clear()
    build(out, CALIBRATED, 1, resume=True)
    assert hashes(out) == hashes(alone)
    assert record(out)["resumed"]["steps_before"] >= 3
    assert "workers" not in record(out)


def test_a_run_of_one_process_goes_on_with_two_workers(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CheckpointWriter.end_step

    def end_step(self: CheckpointWriter, step: str, *rest: Any) -> None:
        original(self, step, *rest)
        if step == "layer 1":
            self.wait_for_step(step)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "end_step", end_step)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "out", CALIBRATED, 1)
    out = build(tmp_path / "out", CALIBRATED, 2, resume=True)
    assert hashes(out) == hashes(alone)
    assert record(out)["resumed"] == {"steps_before": 6}
    assert record(out)["source"] == record(alone)["source"]


def test_a_worker_killed_over_a_shard(many_shards: None, kill_at: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kill_at[:] = ["write_shard", 3]
    out = tmp_path / "out"
    assert main([*COMMAND, str(out), "--weight-only", "0.01", "--workers", "2"]) == 2
    assert "a worker process was killed by signal 9" in capsys.readouterr().err
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert kept
    kill_at.clear()
    build(out, WEIGHT_ONLY, 2, resume=True)
    assert hashes(out) == hashes(build(tmp_path / "one", WEIGHT_ONLY, 1))
    assert record(out)["source"] == record(tmp_path / "one")["source"]
    assert record(out)["resumed"]["steps_before"] >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker ends with the call that it is in")
def test_workers_end_with_the_process_that_started_them(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mtpress", *COMMAND, str(out), "--calibration", "builtin", "--workers", "2"]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    states = tmp_path / "out.partial" / ".mtpress-partial" / "hidden-0.bin"
    while parent.poll() is None and not (states.exists() and states.stat().st_size):
        time.sleep(0.002)
    workers = psutil.Process(parent.pid).children() if parent.poll() is None else []
    parent.kill()
    assert parent.wait(timeout=60) == -signal.SIGKILL
    assert len(workers) >= 2  # and the process that tried the template
    assert psutil.wait_procs(workers, timeout=30)[1] == []
    build(out, CALIBRATED, 1, resume=True)
    assert hashes(out) == hashes(alone)


def write_other_model(other: Path) -> Path:
    """The built-in model under another identity."""
    other.mkdir()
    for path in BUILTIN_MODEL.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"another": "model"}))
    return other


def test_what_a_worker_refuses_is_one_line(tmp_path: Path) -> None:
    other, before = write_other_model(tmp_path / "other"), psutil.Process().children()
    plan = make_plan(Checkpoint.open(BUILTIN_MODEL), WEIGHT_ONLY)
    with (
        CheckpointWriter(tmp_path / "out", plan.shards, {}) as writer,
        pytest.raises(InputError, match="other: is not the same checkpoint on every worker; put it where all of them see it") as caught,
        closing(WorkerPool(plan, writer, other, torch.device("cpu"), 2, None)),
    ):
        pytest.fail("workers of another checkpoint")
    assert "\n" not in str(caught.value)
    assert psutil.Process().children() == before


def test_no_fewer_than_one_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("0", "-1", "1025"):
        assert main([*COMMAND, str(tmp_path / "out"), "--weight-only", "0.01", "--workers", number]) == 2
        assert f"--workers {number}: from 1 to 1024" in capsys.readouterr().err


def test_a_worker_that_stands_still_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mtpress.quantization import worker_pool as workers

    monkeypatch.setattr(workers, "MAX_STOPPED", 2)
    monkeypatch.setattr(workers, "WATCH_SECONDS", 0.1)
    original = ProcessWorker.call

    def call(self: ProcessWorker, method: str, *arguments: Any) -> None:
        if method == "write_shard":
            self.process.send_signal(signal.SIGSTOP)
        original(self, method, *arguments)

    monkeypatch.setattr(ProcessWorker, "call", call)
    before = psutil.Process().children()
    assert main([*COMMAND, str(tmp_path / "out"), "--weight-only", "0.01", "--workers", "2"]) == 2
    assert "a worker process stood still for 0 s (SIGSTOP?) and was ended" in capsys.readouterr().err.splitlines()[-1]
    assert psutil.Process().children() == before and not list(tmp_path.glob("out"))
