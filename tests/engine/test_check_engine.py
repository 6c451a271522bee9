"""`mtpress check --engine` on the real vLLM: green on what mtpress makes, red with the right reason on what it must not serve.

Each check is two or three starts of the engine, most of a minute of one core each; two checks run at a time, each on a core of its own,
for the engine starts a thread a core and threads that wait for one another spin.
"""

import json
import os
import queue
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import Edit
from mtpress.formats import nvfp4
from mtpress.stages.quantize import quantize

pytestmark = pytest.mark.engine

NVFP4 = "nvfp4-mtp-vlm"
LAYER = "model.language_model.layers.0."
CHECK_TIMEOUT_SECONDS = 900
ONE_GIB = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
RUN_ON_CORE = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); os.execv(sys.argv[2], sys.argv[2:])"


def mtp_dropped(e: Edit) -> None:
    for name in [name for name in e.tensors if name.startswith("mtp.")]:
        del e.tensors[name]


def mtp_fc_packed(e: Edit) -> None:
    weight = e.tensors.pop("mtp.fc.weight")
    scale_2 = nvfp4.global_scale(nvfp4.amax(weight))
    codes, block_scales = nvfp4.quantize(weight, scale_2)
    e.tensors |= {"mtp.fc.weight": codes, "mtp.fc.weight_scale": block_scales, "mtp.fc.weight_scale_2": scale_2}
    e.tensors["mtp.fc.input_scale"] = scale_2.clone()
    e.without(lambda name: name == "mtp.fc")


def mtp_not_ignored(e: Edit) -> None:
    e.without(lambda name: name.startswith("mtp"))


def fused_scales_differ(e: Edit) -> None:
    """in_proj_qkv and in_proj_z each right by itself, as an exporter writes them that knows no fusion: vLLM takes the larger for both."""
    module = f"{LAYER}linear_attn.in_proj_qkv"
    blocks = e.tensors[f"{module}.weight_scale"].float()
    e.tensors[f"{module}.weight_scale"] = (blocks * 8).clamp(max=448).to(torch.float8_e4m3fn)
    e.tensors[f"{module}.weight_scale_2"] = e.tensors[f"{module}.weight_scale_2"] / 8


def vision_random(e: Edit) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in e.tensors.items():
        if name.startswith("model.visual.") and tensor.ndim > 1:
            e.tensors[name] = (torch.randn(tensor.shape, generator=generator) * 0.02).to(tensor.dtype)


# build → (how it is broken, findings that must be there); the engine's own word is among them wherever it has one
BROKEN: dict[str, tuple[Callable[[Edit], None], set[str]]] = {
    "mtp_dropped": (mtp_dropped, {"mtp-missing", "engine-refuses-drafts"}),
    "mtp_fc_packed": (mtp_fc_packed, {"mtp-quantized", "engine-refuses-drafts"}),
    "mtp_not_ignored": (mtp_not_ignored, {"mtp-not-ignored", "engine-refuses-drafts"}),
    "fused_scales_differ": (fused_scales_differ, {"fused-scales-differ", "engine-logits"}),
    "vision_random": (vision_random, {"engine-pictures"}),
}
IN_SHORT = ("vision_random",)  # a start takes over a minute of a core; `make soak` has all
TRIED = list(BROKEN) if os.environ.get("MTPRESS_SOAK") else IN_SHORT


@dataclass(frozen=True)
class Checked:
    """One call of the command: exit code, its JSON, the checkpoint."""

    code: int
    result: dict[str, Any]
    checkpoint: Path

    @property
    def errors(self) -> set[str]:
        return {finding["id"] for finding in self.result["findings"] if finding["severity"] == "error"}


@pytest.fixture(scope="module")
def checked(engine_python: Path, bf16_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checked]:
    folder = tmp_path_factory.mktemp("check-engine")
    sound = folder / NVFP4
    quantize(bf16_model, sound, NVFP4, calibration=["builtin"], device="cpu", silent=True)
    with_base = ["--base", str(bf16_model)]
    calls: dict[str, tuple[Path, list[str]]] = {NVFP4: (sound, with_base)}
    for name in TRIED:
        shutil.copytree(sound, folder / name)
        edit = Edit(folder / name)
        BROKEN[name][0](edit)
        edit.save()
        calls[name] = (folder / name, with_base if name == "fused_scales_differ" else [])

    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in (sorted(os.sched_getaffinity(0)) * 2)[:2]:
        cores.put(core)

    def call(name: str) -> Checked:
        checkpoint, arguments = calls[name]
        command = [sys.executable, "-m", "mtpress", "check", str(checkpoint), "--engine", str(engine_python), "--json", *arguments]
        command += ["--engine-logs", str(folder / f"{name}-logs")]
        core = cores.get()
        command = [sys.executable, "-c", RUN_ON_CORE, str(core), *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_TIMEOUT_SECONDS, env=ONE_GIB)
        cores.put(core)
        assert done.returncode in (0, 1), f"{name}: {done.stderr[-3000:]}"
        return Checked(done.returncode, json.loads(done.stdout), checkpoint)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(calls, pool.map(call, calls), strict=True))


def test_a_sound_build_is_green(checked: dict[str, Checked]) -> None:
    seen = checked[NVFP4]
    assert (seen.code, seen.errors) == (0, set()), seen.result["findings"]
    engine = seen.result["engine"]
    assert engine["with_drafts"]["refusal"] is None
    assert engine["with_drafts"]["right_of_asked"]["picture"][1] >= 6
    assert engine["with_drafts"]["draft_head"]["num_drafts"] > 100
    assert engine["num_stories_compared"] >= 6
    assert seen.result["num_findings"]["error"] == 0


def test_the_base_is_asked_the_same(checked: dict[str, Checked]) -> None:
    engine = checked[NVFP4].result["engine"]
    assert engine["base"]["draft_head"]["per_position"][0] > 0.5
    assert engine["logits"]["num_tokens"] > 300
    assert 0 < engine["logits"]["mean_kl"] < 0.1


def test_the_verdict_is_written_into_the_record(checked: dict[str, Checked]) -> None:
    seen = checked[NVFP4]
    record = json.loads((seen.checkpoint / "mtpress.json").read_text())
    assert seen.result["recorded"] is True
    assert record["engine_check"]["sound"] is True
    assert record["engine_check"]["with_drafts"] == seen.result["engine"]["with_drafts"]
    assert record["recipe"]["name"] == NVFP4


@pytest.mark.parametrize("build", TRIED)
def test_a_broken_build_is_red_for_its_reason(build: str, checked: dict[str, Checked]) -> None:
    seen = checked[build]
    assert seen.code == 1
    assert BROKEN[build][1] <= seen.errors, seen.result["findings"]
    assert json.loads((seen.checkpoint / "mtpress.json").read_text())["engine_check"]["sound"] is False
