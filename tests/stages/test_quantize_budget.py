"""quantize under a byte budget, end to end on the built-in model: sound, within its bytes, between its neighbours, and resumable."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.journal import JOURNAL_NAME, SENSITIVITY_NAME
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.plan.recipe import Recipe, parse_recipe
from mtpress.quantization.sensitivity import Layer
from mtpress.stages.eval import evaluate
from mtpress.stages.quantize import quantize

NAMED = {"name": "mine", "summary": "x", "calibration": {"num_samples": 4, "max_seq_len": 96}}
FIXED_BYTES = 6_578_040  # of the map that NVIDIA's builds have: NVFP4 MLP, FP8 attention and GDN


def recipe(size: int = FIXED_BYTES) -> Recipe:
    return parse_recipe({**NAMED, "budget": {"bytes": size}}, "here")


def build(out: Path, of: Recipe, **more: Any) -> dict[str, Any]:
    return quantize(BUILTIN_MODEL, out, of, calibration=["builtin"], silent=True, **more).as_json()


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the record, whose timings differ."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.is_file() and p.name != "mtpress.json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The budget's build, and two of one format throughout."""
    made = tmp_path_factory.mktemp("budget")
    build(made / "budget", recipe())
    for name in ("nvfp4", "fp8"):
        build(made / name, parse_recipe({**NAMED, "formats": dict.fromkeys(("mlp", "attention", "gdn"), name)}, "here"))
    return made


def test_the_output_is_sound_and_keeps_its_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(folder / "budget"), "--base", str(BUILTIN_MODEL), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    record = json.loads((folder / "budget" / "mtpress.json").read_text())
    index = json.loads((folder / "budget" / "model.safetensors.index.json").read_text())
    chosen = record["budget"]
    assert record["recipe"] == recipe().canonical()
    assert chosen["chosen_bytes"] == index["metadata"]["total_size"] == sum(record["bytes_by_component"].values())
    assert chosen["least_bytes"] < FIXED_BYTES - 50_000 < chosen["chosen_bytes"] <= FIXED_BYTES == chosen["bytes"]
    assert len({group["format"] for group in chosen["groups"]}) > 1
    declared = json.loads((folder / "budget" / "hf_quant_config.json").read_text())["quantization"]
    assert declared["quant_algo"] == "MIXED_PRECISION"
    layers = {module.split(".layers.")[1]: said["quant_algo"] for module, said in declared["quantized_layers"].items()}
    down = {group["linear"]: group["format"] for group in chosen["groups"] if group["linear"].endswith("down_proj")}
    assert {name: layers.get(name.removeprefix("layers."), "bf16").lower() for name in down} == down


def test_it_lies_between_the_formats(folder: Path) -> None:
    result = evaluate([folder / name for name in ("nvfp4", "budget", "fp8")], BUILTIN_MODEL, limit=6, resamples=2, silent=True)
    kl = {name: of.groups["all"].kl_mean.value for name, of in result.checkpoints.items()}
    assert kl["fp8"] < kl["budget"] < kl["nvfp4"]


def test_a_run_that_was_killed_while_it_measured_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe().canonical()))
    command = [sys.executable, "-m", "mtpress", "quantize", str(BUILTIN_MODEL), str(tmp_path / "out"), "--recipe", str(file)]
    process = subprocess.Popen(
        [*command, "--calibration", "builtin"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    lines = tmp_path / "out.partial" / JOURNAL_NAME / SENSITIVITY_NAME
    while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):  # two layers
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    measured: list[str] = []
    original = Layer.errors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "errors", lambda self, jobs: measured.append(self.title) or original(self, jobs))
        build(tmp_path / "out", recipe(), resume=True)
    assert set(measured) <= {"layer 2", "layer 3"}  # what was measured is not measured again
    assert hashes(tmp_path / "out") == hashes(folder / "budget")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    records = [json.loads((path / "mtpress.json").read_text()) for path in (tmp_path / "out", folder / "budget")]
    assert records[0]["budget"] == records[1]["budget"]


def test_a_run_that_was_stopped_says_what_is_kept_and_refuses_another_budget(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, passed = Layer.errors, list[str]()

    def stopped(self: Layer, jobs: Any) -> Any:
        if len(passed) == 1:
            raise KeyboardInterrupt
        passed.append(self.title)
        return original(self, jobs)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "errors", stopped)
        with pytest.raises(KeyboardInterrupt, match=r"1 measured layers are kept in .*--resume goes on there"):
            build(tmp_path / "out", recipe())
    end_step = CheckpointWriter.end_step

    def stop(self: CheckpointWriter, step: str, *rest: Any) -> None:
        end_step(self, step, *rest)
        if step == "layer 0":
            self.wait_for_step(step)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "end_step", stop)
        with pytest.raises(KeyboardInterrupt, match="5 finished steps are kept"):
            build(tmp_path / "out", recipe(), resume=True)
    with pytest.raises(InputError, match="was begun with budget 6578040, not 7000000"):
        build(tmp_path / "out", recipe(7_000_000), resume=True)
    with pytest.raises(InputError, match="holds an unfinished run, 5 steps of it done"):
        build(tmp_path / "out", recipe())
    with monkeypatch.context() as patch:
        patch.setattr(Layer, "errors", None)  # nothing is measured again
        build(tmp_path / "out", recipe(), resume=True)
    assert hashes(tmp_path / "out") == hashes(folder / "budget")


def test_resume_of_what_is_finished_tells_the_choice_again(folder: Path) -> None:
    again = build(folder / "budget", recipe(), resume=True)
    record = json.loads((folder / "budget" / "mtpress.json").read_text())
    assert again["budget"] == record["budget"] and again["bytes_by_component"] == record["bytes_by_component"]
    with pytest.raises(InputError, match="was made with recipe budget bytes 6578040, not 7000000"):
        build(folder / "budget", recipe(7_000_000), resume=True)


def test_a_dry_run_says_what_can_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe().canonical()))
    command = ["quantize", str(BUILTIN_MODEL), str(tmp_path / "out"), "--recipe", str(file), "--calibration", "builtin", "--dry-run"]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "outputs from 6.12 MB to 9.89 MB can be reached" in shown and "the formats need a pass over the samples" in shown
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget"] == {"bytes": FIXED_BYTES, "least_bytes": 6_119_288, "most_bytes": 9_887_408}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]
