"""A run that was stopped: what it leaves, how it goes on, and that the bytes are those of a run that was not."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.journal import JOURNAL_NAME
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.errors import InputError, ResourceError
from mtpress.plan.recipe import CalibrationSource, Recipe, SignRound, load_recipe, parse_recipe
from mtpress.stages.quantize import quantize

CALIBRATED = load_recipe("nvfp4-mtp-vlm")
WEIGHT_ONLY = CALIBRATED.model_copy(update={"constant_input_scale": 0.01})
INT4 = {rounding: load_recipe("int4-mtp-vlm").model_copy(update={"rounding": rounding}) for rounding in ("search", "rtn")}
STEPS = ["embeddings", "vision tower", "final norm and lm_head", "draft head", "layer 0", "layer 1", "layer 2", "layer 3"]


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the record, whose timings differ."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.is_file() and p.name != "mtpress.json"}


def build(out: Path, recipe: Recipe, resume: bool = False, source: Path = BUILTIN_MODEL) -> Path:
    quantize(source, out, recipe, calibration=["builtin"], resume=resume, silent=True)
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    made = {"calibrated": CALIBRATED, "weight-only": WEIGHT_ONLY}
    return {kind: hashes(build(tmp_path_factory.mktemp(kind) / "out", recipe)) for kind, recipe in made.items()}


@pytest.fixture(scope="module")
def whole_int4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return {kind: hashes(build(tmp_path_factory.mktemp(kind) / "out", recipe)) for kind, recipe in INT4.items()}


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Fill it with (step, exception): the run raises that once the step is finished."""
    wanted: list[object] = []
    original = CheckpointWriter.end_step

    def end_step(self: CheckpointWriter, step: str, *rest: Any) -> None:
        original(self, step, *rest)
        if wanted and wanted[0] == step:
            self.wait_for_step(step)
            raise wanted[1]  # type: ignore[misc]

    monkeypatch.setattr(CheckpointWriter, "end_step", end_step)
    yield wanted


@pytest.mark.parametrize("kind", ["calibrated", "weight-only"])
@pytest.mark.parametrize("step", STEPS)
def test_a_run_that_goes_on_writes_the_same_bytes(
    kind: str, step: str, whole: dict[str, dict[str, str]], stop_after: list[object], tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", CALIBRATED if kind == "calibrated" else WEIGHT_ONLY
    stop_after[:] = [step, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt, match=r"finished steps are kept in .*--resume goes on"):
        build(out, recipe)
    assert not out.exists()
    written: list[str] = []
    stop_after.clear()
    original = CheckpointWriter._take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "_take", lambda self, name: written.append(name) or original(self, name))
        build(out, recipe, resume=True)
    assert hashes(out) == whole[kind]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    record = json.loads((out / "mtpress.json").read_text())
    assert record["resumed"] == {"steps_before": STEPS.index(step) + 1}
    if step == "layer 2":  # nothing of the finished layers was made again
        assert written
        assert not any(f"layers.{i}." in name for name in written for i in (0, 1, 2) if name.startswith("model."))


@pytest.mark.parametrize(("rounding", "step"), [("search", "embeddings"), ("search", "layer 1"), ("rtn", "layer 3")])
def test_an_int4_run_that_goes_on_writes_the_same_bytes(
    rounding: str, step: str, whole_int4: dict[str, dict[str, str]], stop_after: list[object], tmp_path: Path
) -> None:
    stop_after[:] = [step, KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt, match=r"finished steps are kept in .*--resume goes on"):
        build(tmp_path / "out", INT4[rounding])
    stop_after.clear()
    with pytest.raises(InputError, match=r"begun with recipe rounding"):
        build(tmp_path / "out", INT4["rtn" if rounding == "search" else "search"], resume=True)
    build(tmp_path / "out", INT4[rounding], resume=True)
    assert hashes(tmp_path / "out") == whole_int4[rounding] != whole_int4["rtn" if rounding == "search" else "search"]
    assert json.loads((tmp_path / "out" / "mtpress.json").read_text())["resumed"] == {"steps_before": STEPS.index(step) + 1}


def test_an_int4_run_that_was_killed_goes_on(whole_int4: dict[str, dict[str, str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mtpress", "quantize", str(BUILTIN_MODEL), str(out), "--recipe", "int4-mtp-vlm"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (tmp_path / "out.partial" / "model.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    build(out, INT4["search"], resume=True)
    assert hashes(out) == whole_int4["search"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_sign_gradient_run_that_goes_on_knows_its_losses(stop_after: list[object], tmp_path: Path) -> None:
    recipe = load_recipe("int4-autoround-mtp").model_copy(
        update={"signround": SignRound(iterations=2, batch_size=2), "calibration": CalibrationSource(num_samples=3, max_seq_len=48)}
    )
    whole = hashes(build(tmp_path / "whole", recipe))
    stop_after[:] = ["layer 1", KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", recipe)
    stop_after.clear()
    assert hashes(build(tmp_path / "out", recipe, resume=True)) == whole
    records = [json.loads((tmp_path / name / "mtpress.json").read_text()) for name in ("whole", "out")]
    assert records[0]["losses"] == records[1]["losses"] and list(records[0]["losses"]) == ["0", "1", "2", "3"]


GPTQ = parse_recipe({**CALIBRATED.canonical(), "rounding": "gptq", "calibration": {"num_samples": 3, "max_seq_len": 24}}, "a test")


def test_a_gptq_run_that_was_killed_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Killed in the midst of a layer, when two are finished; what it knows of their errors is in the record."""
    whole = hashes(build(tmp_path / "whole", GPTQ))
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(GPTQ.canonical()))
    command = [sys.executable, "-m", "mtpress", "quantize", str(BUILTIN_MODEL), str(out), "--recipe", str(recipe)]
    process = subprocess.Popen(
        [*command, "--calibration", "builtin"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    journal = tmp_path / "out.partial" / JOURNAL_NAME / "model.safetensors.jsonl"
    while process.poll() is None and not (journal.exists() and '"layer 1"' in journal.read_text()):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert hashes(build(out, GPTQ, resume=True)) == whole
    records = [json.loads((tmp_path / name / "mtpress.json").read_text()) for name in ("whole", "out")]
    assert records[0]["losses"] == records[1]["losses"] and list(records[0]["losses"]) == ["0", "1", "2", "3"]
    assert records[1]["resumed"]["steps_before"] >= STEPS.index("layer 1") + 1
    assert records[0]["recipe"]["gptq"]["damping"] == 0.05


def test_finished_layers_are_not_passed_again(stop_after: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtpress.calibration.forward import CalibrationPass

    stop_after[:] = ["layer 1", ResourceError("no room")]
    with pytest.raises(ResourceError, match="no room; 6 finished steps are kept"):
        build(tmp_path / "out", CALIBRATED)
    stop_after.clear()
    passed = []
    original = CalibrationPass.layer
    monkeypatch.setattr(CalibrationPass, "layer", lambda self, step, tensors: passed.append(step.layer) or original(self, step, tensors))
    build(tmp_path / "out", CALIBRATED, resume=True)
    assert passed == [2, 3]


def test_resume_starts_where_nothing_is_and_ends_where_all_is_done(whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    out = build(tmp_path / "out", WEIGHT_ONLY, resume=True)
    assert hashes(out) == whole["weight-only"]
    before = (out / "mtpress.json").stat().st_mtime_ns
    (out / JOURNAL_NAME).mkdir()  # as if killed between the rename and the end
    build(out, WEIGHT_ONLY, resume=True)
    assert (out / "mtpress.json").stat().st_mtime_ns == before
    assert hashes(out) == whole["weight-only"]
    assert not (out / JOURNAL_NAME).exists()
    with pytest.raises(InputError, match=r"exists already and was made with recipe constant_input_scale 0\.01, not 0\.02"):
        build(out, WEIGHT_ONLY.model_copy(update={"constant_input_scale": 0.02}), resume=True)


def test_an_unfinished_run_is_not_thrown_away_unasked(stop_after: list[object], tmp_path: Path) -> None:
    stop_after[:] = ["layer 1", KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", WEIGHT_ONLY)
    with pytest.raises(InputError, match="holds an unfinished run, 6 steps of it done; go on with --resume, or delete it"):
        build(tmp_path / "out", WEIGHT_ONLY)
    assert (tmp_path / "out.partial" / "model.safetensors").exists()


def test_another_run_is_refused_by_what_differs(stop_after: list[object], tmp_path: Path) -> None:
    source = shutil.copytree(BUILTIN_MODEL, tmp_path / "source")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "Mia lives in Brook."}\n')
    stop_after[:] = ["layer 1", KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", CALIBRATED, source=source)
    stop_after.clear()
    with pytest.raises(InputError, match="begun with recipe in_proj_ab bf16, not nvfp4"):
        build(tmp_path / "out", CALIBRATED.model_copy(update={"in_proj_ab": "nvfp4"}), resume=True, source=source)
    with pytest.raises(InputError, match=r"begun with calibration source builtin, not lines\.jsonl"):
        quantize(source, tmp_path / "out", CALIBRATED, calibration=[str(lines)], resume=True, silent=True)
    weights = source / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    with pytest.raises(InputError, match=r"begun with source model\.safetensors mtime_ns"):
        build(tmp_path / "out", CALIBRATED, resume=True, source=source)
    assert (tmp_path / "out.partial").exists()


def test_a_damaged_partial_output_is_noticed(stop_after: list[object], tmp_path: Path) -> None:
    stop_after[:] = ["layer 1", KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", WEIGHT_ONLY)
    stop_after.clear()
    partial = tmp_path / "out.partial" / "model.safetensors"
    with partial.open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)
        file.seek(100_000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match="its bytes are not those the journal tells of"):
        build(tmp_path / "out", WEIGHT_ONLY, resume=True)


@pytest.mark.parametrize("change", ["size", "modification time", "gone"])
def test_a_source_that_changes_stops_the_run(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shutil.copytree(BUILTIN_MODEL, tmp_path / "source")
    weights = source / "model.safetensors"
    original = CheckpointWriter.end_step

    def end_step(self: CheckpointWriter, step: str, *rest: Any) -> None:
        original(self, step, *rest)
        if step == "layer 1":
            if change == "size":
                with weights.open("ab") as file:
                    file.write(b"x")
            elif change == "gone":
                weights.rename(source / "elsewhere")
            else:
                os.utime(weights, ns=(1, 1))

    monkeypatch.setattr(CheckpointWriter, "end_step", end_step)
    with pytest.raises(InputError, match="cannot be read" if change == "gone" else f"its {change} changed while it was read"):
        build(tmp_path / "out", WEIGHT_ONLY, source=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_it_cleanly(number: signal.Signals, whole: dict[str, dict[str, str]], tmp_path: Path) -> None:
    before = hashes(BUILTIN_MODEL)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mtpress", "quantize", str(BUILTIN_MODEL), str(out)]
    command += ["--recipe", "nvfp4-mtp-vlm", "--calibration", "builtin"]

    def defaults() -> None:  # a job in the background is started with some of them ignored
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)

    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=defaults,
    )  # fmt: skip
    partial = out.with_name("out.partial")
    while not (partial / "model.safetensors").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert not out.exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        lines = [line for line in errors.splitlines() if not line.startswith("quantize ")]
        assert len(lines) == 1
        assert lines[0].startswith(f"mtpress quantize: ended by {number.name}; ")
        assert ("--resume goes on there" in lines[0]) == partial.exists()
    assert hashes(BUILTIN_MODEL) == before
    build(out, CALIBRATED, resume=True)
    assert hashes(out) == whole["calibrated"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
