"""FP8 KV caches in the real vLLM: the dtype it allocates, the scales it loads, and what they cost in likelihood."""

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_cache import skip_without_kernel

from mtpress.builtin import BUILTIN_MODEL, EVALUATION_FILE
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.formats.kv_cache import K_SCALE, V_SCALE
from mtpress.plan.recipe import CalibrationSource, load_recipe
from mtpress.stages.quantize import quantize

pytestmark = pytest.mark.engine
LAYER, DRAFT = "language_model.model.layers.3.self_attn.attn", "mtp.layers.0.self_attn.attn"
NO_SCALES = "Using KV cache scaling factor 1.0 for fp8_e4m3"  # what vLLM 0.32 says where a layer has none


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without_kernel()
    out = tmp_path_factory.mktemp("kv") / "calibrated"
    source = CalibrationSource(dataset="builtin-mixed", num_samples=40)
    recipe = load_recipe("nvfp4-mixed-vlm").model_copy(update={"kv_cache": "fp8", "calibration": source})
    quantize(BUILTIN_MODEL, out, recipe, device="cpu", silent=True)
    return out


def ask(engine_python: Path, checkpoint: Path, folder: Path, **request: Any) -> tuple[dict[str, Any], str]:
    """The probe's result, and what vLLM wrote to its log."""
    texts = [row["text"] for row in map(json.loads, EVALUATION_FILE.read_text().splitlines()) if "text" in row][:16]
    asked, answered = folder / "request.json", folder / "result.json"
    asked.write_text(json.dumps({"prompts": [{"text": text} for text in texts], "max_tokens": 1, "prompt_logprobs": True, **request}))
    command = [str(engine_python), "-m", "mtpress.engine.plugins.probe", str(checkpoint), str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(answered.read_text()), done.stdout + done.stderr


def likelihoods(result: dict[str, Any]) -> list[float]:
    return [value for output in result["outputs"] for value in output["prompt_logprobs"][1:]]


def test_calibrated_scales_are_loaded_and_cost_little(engine_python: Path, calibrated: Path, tmp_path: Path) -> None:
    stored = Checkpoint.open(calibrated)
    fp8, log = ask(engine_python, calibrated, tmp_path)
    assert fp8["kv_cache"]["requested"] == "auto" and fp8["kv_cache"]["resolved"] == "fp8_e4m3"
    assert fp8["kv_cache"]["tensors"] == {LAYER: "uint8"}
    # vLLM 0.32 holds the scales in the dtype of the model
    expected = [float(stored.read(f"model.language_model.layers.3.{name}").bfloat16()) for name in (K_SCALE, V_SCALE)]
    assert fp8["kv_cache"]["scales"] == {LAYER: expected} and all(0 < scale < 1 for scale in expected)
    assert NO_SCALES not in log
    plain, _ = ask(engine_python, calibrated, tmp_path, kv_cache_dtype="bfloat16")
    assert plain["kv_cache"]["tensors"] == {LAYER: "bfloat16"}
    with_fp8, without = likelihoods(fp8), likelihoods(plain)
    assert len(with_fp8) == len(without) > 500
    differences = [a - b for a, b in zip(with_fp8, without, strict=True)]
    assert max(map(abs, differences)) > 0
    assert abs(statistics.mean(differences)) < 0.02 and statistics.mean(map(abs, differences)) < 0.05


def test_the_draft_head_has_an_fp8_cache_and_the_scale_one(engine_python: Path, calibrated: Path, tmp_path: Path) -> None:
    found, log = ask(engine_python, calibrated, tmp_path, mtp=1, max_tokens=24, prompt_logprobs=False)
    assert found["kv_cache"]["tensors"] == {LAYER: "uint8", DRAFT: "uint8"}
    assert found["kv_cache"]["scales"][DRAFT] == [1.0, 1.0] != found["kv_cache"]["scales"][LAYER]
    assert log.count(NO_SCALES) == 1  # for the head alone
    assert found["metrics"]["all"]["drafts"] >= 0


def test_the_scales_are_those_of_the_largest_keys_and_values(calibrated: Path) -> None:
    stored = Checkpoint.open(calibrated)
    for name in (K_SCALE, V_SCALE):
        scale = stored.read(f"model.language_model.layers.3.{name}")
        assert scale.dtype == torch.float32 and scale.shape == ()
    assert not [name for name in stored.tensors if name.startswith("mtp.") and name.endswith("_scale")]
