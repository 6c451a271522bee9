"""quantize by every choice of scales: standard outputs, ordered by what they do to unseen inputs; runs that are stopped or spread."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from mtpress.builtin import BUILTIN_MODEL
from mtpress.calibration.block_hessian import InputHessian
from mtpress.calibration.forward import CalibrationPass
from mtpress.calibration.samples import InputAmax, load_calibration
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import read_tensor
from mtpress.checkpoint.writer import CheckpointWriter
from mtpress.errors import InputError
from mtpress.formats import int4, nvfp4
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import CalibrationSource, Recipe, load_recipe, parse_recipe
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize

NVFP4 = ("max", "four-over-six", "sweep", "hessian")
INT4 = ("rtn", "search", "hessian")
EVALUATION = Path(BUILTIN_MODEL).parent / "evaluation.jsonl"


def recipe(rounding: str, build: str = "nvfp4-mtp-vlm") -> Recipe:
    content = load_recipe(build).canonical() | {"rounding": rounding}
    return parse_recipe(content | {"calibration": {"num_samples": 24}}, "here")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(build, rounding) → an output of mtpress-tiny."""
    folder, outs = tmp_path_factory.mktemp("choices"), {}
    for build, roundings in (("nvfp4-mtp-vlm", NVFP4), ("int4-mtp-vlm", INT4)):
        for rounding in roundings:
            outs[build, rounding] = out = folder / f"{build}-{rounding}"
            quantize(BUILTIN_MODEL, out, recipe(rounding, build), silent=True)
    return outs


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weight name → Σ x xᵀ float64 [K, K] over what the BF16 model's linears read of the evaluation set."""

    class Whole(InputAmax):
        def __call__(self, name: str, inputs: Tensor) -> None:
            tokens = inputs.reshape(-1, inputs.shape[-1]).double()
            sums[f"{start}{name}.weight"] = sums.get(f"{start}{name}.weight", 0) + tokens.T @ tokens

    source = Checkpoint.open(BUILTIN_MODEL)
    plan = make_plan(source, recipe("max"))
    samples = load_calibration(source.path, CalibrationSource(num_samples=16), [str(EVALUATION)]).samples
    sums: dict[str, Tensor] = {}
    forward = CalibrationPass(plan, samples, torch.device("cpu"), tmp_path_factory.mktemp("states"))
    for step in plan.steps:
        if step.layer is not None:
            start = f"{plan.prefix}layers.{step.layer}."
            weights = {info.name.removeprefix(start): read_tensor(info) for job in step.jobs for info in job.sources}
            forward.body.layer(step.layer, weights, Whole())
    forward.close()
    return sums


def stored(out: Path, weight: str) -> Tensor:
    """float64 [N, K] of a linear as an engine reads it."""
    tensors, module = Checkpoint.open_stored(out).tensors, weight.removesuffix(".weight")

    def read(suffix: str) -> Tensor:
        return read_tensor(tensors[f"{module}.{suffix}"])

    if f"{module}.qweight" in tensors:
        return int4.dequantize(read("qweight"), read("qzeros"), read("scales")).double()
    return nvfp4.dequantize(read("weight"), read("weight_scale"), read("weight_scale_2")).double()


def output_errors(out: Path, unseen: dict[str, Tensor]) -> Tensor:
    """Of each quantized linear, how much of its output's energy on unseen inputs is error."""
    source, found = Checkpoint.open(BUILTIN_MODEL), []
    names = [name for step in make_plan(source, recipe("max")).steps for name in step.quantized]
    assert len(names) > 20
    for name in names:
        exact = read_tensor(source.tensors[name]).double()
        error = stored(out, name) - exact
        found.append(((error @ unseen[name]) * error).sum() / ((exact @ unseen[name]) * exact).sum())
    return torch.stack(found)


def test_nvfp4_choices_are_ordered_on_unseen_inputs(made: dict[tuple[str, str], Path], unseen: dict[str, Tensor]) -> None:
    errors = {rounding: output_errors(made["nvfp4-mtp-vlm", rounding], unseen) for rounding in NVFP4}
    means = [float((errors[rounding] / errors["max"]).mean()) for rounding in NVFP4]
    assert means[0] == 1 and means[1] < 0.87 and means[2] < 0.77 and means[3] < 0.70
    assert (errors["sweep"] < errors["max"]).all() and (errors["hessian"] < errors["max"]).all()


def test_int4_choices_are_ordered_on_unseen_inputs(made: dict[tuple[str, str], Path], unseen: dict[str, Tensor]) -> None:
    errors = {rounding: output_errors(made["int4-mtp-vlm", rounding], unseen) for rounding in INT4}
    means = [float((errors[rounding] / errors["rtn"]).mean()) for rounding in INT4]
    assert means[0] == 1 and means[1] < 0.97 and means[2] < 0.97 * means[1]


def test_every_choice_is_standard_nvfp4_of_the_same_size(made: dict[tuple[str, str], Path]) -> None:
    plain = Checkpoint.open_stored(made["nvfp4-mtp-vlm", "max"])
    for rounding in NVFP4[1:]:
        out = made["nvfp4-mtp-vlm", rounding]
        assert not check(out, base=BUILTIN_MODEL, silent=True).findings
        found = Checkpoint.open_stored(out)
        assert {n: (i.dtype, i.shape) for n, i in found.tensors.items()} == {n: (i.dtype, i.shape) for n, i in plain.tensors.items()}
        for name, info in found.tensors.items():
            theirs, ours = read_tensor(plain.tensors[name]), read_tensor(info)
            if name.endswith("weight_scale_2"):
                torch.testing.assert_close(ours, theirs * 448 / 256, rtol=1e-6, atol=0)
            elif info.dtype not in ("U8", "F8_E4M3"):
                assert torch.equal(ours, theirs), name
        shared = [read_tensor(found.tensors[f"model.language_model.layers.3.self_attn.{p}_proj.weight_scale_2"]) for p in "qkv"]
        assert shared[0] == shared[1] == shared[2]


def hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file but the record, whose timings differ."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if p.is_file() and p.name != "mtpress.json"}


@pytest.mark.parametrize("build", ["nvfp4-mtp-vlm", "int4-mtp-vlm"])
def test_workers_write_the_same_bytes(build: str, made: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    quantize(BUILTIN_MODEL, tmp_path / "out", recipe("hessian", build), workers=3, silent=True)
    assert hashes(tmp_path / "out") == hashes(made[build, "hessian"])


def test_a_run_that_carries_a_hessian_is_killed_and_goes_on(made: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    out, written = tmp_path / "out", tmp_path / "recipe.yaml"
    written.write_text(yaml.safe_dump(recipe("hessian").canonical()), encoding="utf-8")
    command = [sys.executable, "-m", "mtpress", "quantize", str(BUILTIN_MODEL), str(out), "--recipe", str(written)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not any("layer 1" in p.read_text() for p in tmp_path.glob("out.partial/.mtpress-partial/*.jsonl")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    quantize(BUILTIN_MODEL, out, recipe("hessian"), resume=True, silent=True)
    assert json.loads((out / "mtpress.json").read_text())["resumed"]["steps_before"] >= 6
    assert hashes(out) == hashes(made["nvfp4-mtp-vlm", "hessian"])


def test_a_layer_that_was_begun_is_done_again_whole(
    made: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = InputHessian.add, []

    def add(self: InputHessian, name: str, inputs: Tensor) -> None:
        calls.append(name)
        if len(calls) == 230:  # in the middle of a layer
            raise KeyboardInterrupt
        original(self, name, inputs)

    monkeypatch.setattr(InputHessian, "add", add)
    with pytest.raises(KeyboardInterrupt):
        quantize(BUILTIN_MODEL, tmp_path / "out", recipe("hessian"), silent=True)
    quantize(BUILTIN_MODEL, tmp_path / "out", recipe("hessian"), resume=True, silent=True)
    assert hashes(tmp_path / "out") == hashes(made["nvfp4-mtp-vlm", "hessian"])


def test_only_one_of_the_linears_that_read_the_same_input_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(InputHessian, "add", lambda self, name, inputs: counted.append(name))
    monkeypatch.setattr(CheckpointWriter, "write", lambda self, name, tensor: None)
    wanted = recipe("hessian").model_copy(update={"quantize": ("attention", "mlp"), "calibration": CalibrationSource(num_samples=1)})
    with pytest.raises(KeyError):  # as nothing was summed
        quantize(BUILTIN_MODEL, tmp_path / "out", wanted, silent=True)
    assert [name for name in counted if name] == ["mlp.gate_proj", "mlp.down_proj"]  # preflight's probe has no name


def test_without_samples_there_is_no_hessian(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="constant_input_scale does not go with rounding hessian, which needs samples; take rounding sweep"
    ):
        parse_recipe(recipe("hessian").canonical() | {"constant_input_scale": 0.01}, "here")
    quantize(
        BUILTIN_MODEL, tmp_path / "out", parse_recipe(recipe("sweep").canonical() | {"constant_input_scale": 0.01}, "here"), silent=True
    )
    assert not check(tmp_path / "out", base=BUILTIN_MODEL, silent=True).findings
