"""The INT4 build in transformers with auto-round installed: both Auto classes load it, without trust_remote_code and with no
parameter missing, and it answers as the same weights do in BF16.

The reference is the build itself, dequantized by formats/int4.py into a plain checkpoint; only the order of sums is another.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from corpus import direct_sums, document, see
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.formats import int4
from mtpress.plan.recipe import load_recipe
from mtpress.stages.quantize import quantize

pytestmark = pytest.mark.oracle
SCRIPT = Path(__file__).with_name("transformers_answers.py")
TIMEOUT_SECONDS = 900
CLASSES = {"AutoModelForImageTextToText": "Qwen3_5ForConditionalGeneration", "AutoModelForCausalLM": "Qwen3_5ForCausalLM"}
BUILD, REFERENCE = "build", "reference"
NUM_LINEARS = 25  # six in each of three GDN layers, seven in the full-attention layer
# The largest logits lie between 16 and 32, where two BF16 numbers are 1/8 apart: two steps
LOGIT_STEPS = 0.25
Found = dict[tuple[str, str], tuple[dict[str, Any], list[torch.Tensor]]]


def dequantized(build: Path, out: Path) -> Path:
    """The build as a plain BF16 checkpoint."""
    checkpoint, tensors = Checkpoint.open(build), {}
    for name in checkpoint.tensors:
        module, _, part = name.rpartition(".")
        if part == int4.QWEIGHT:
            stored = [checkpoint.read(f"{module}.{p}") for p in (int4.QWEIGHT, int4.QZEROS, int4.SCALES)]
            tensors[f"{module}.weight"] = int4.dequantize(*stored).to(torch.bfloat16)
        elif part not in (int4.QZEROS, int4.SCALES):
            tensors[name] = checkpoint.read(name)
    out.mkdir()
    for file in build.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in ("quantization_config.json", "model.safetensors.index.json"):
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def questions(folder: Path, pictures: bool) -> Iterator[list[dict[str, Any]]]:
    """Messages: facts and sums, then two pictures."""
    for index in range(2):
        yield document("held-out", index, ("town_fact",)).messages[:1]
        yield direct_sums(random.Random(index), held_out=True).messages[:1]
    for index in range(2 if pictures else 0):
        shown = see(random.Random(900_000 + index), num_items=1)
        file = folder / f"{index}.png"
        shown.pictures[0].draw().save(file)
        text = next(part for part in shown.messages[0]["content"] if part["type"] == "text")
        yield [{"role": "user", "content": [{"type": "image", "path": str(file)}, text]}]


@pytest.fixture(scope="module", params=["int4-mtp-vlm", *(["int4-autoround-mtp"] if os.environ.get("MTPRESS_SOAK") == "1" else [])])
def found(request: pytest.FixtureRequest, autoround_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """(build or reference, Auto class) → what came back, and the logits of each answer."""
    folder = tmp_path_factory.mktemp("transformers")
    recipe = load_recipe(request.param)
    if recipe.rounding == "signround":  # a few steps: this is about loading, not about quality
        recipe = recipe.model_copy(update={"signround": recipe.signround.model_copy(update={"iterations": 2})})
    quantize(BUILTIN_MODEL, folder / BUILD, recipe, calibration=["builtin"], device="cpu", silent=True)
    dequantized(folder / BUILD, folder / REFERENCE)
    asked = [(which, kind) for which in (BUILD, REFERENCE) for kind in CLASSES]
    entries = [
        {"class": kind, "checkpoint": str(folder / which), "questions": list(questions(folder, kind == "AutoModelForImageTextToText"))}
        for which, kind in asked
    ]
    (folder / "request.json").write_text(json.dumps(entries), encoding="utf-8")
    files = [str(folder / name) for name in ("request.json", "result.json", "logits.safetensors")]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [str(autoround_python), str(SCRIPT), *files], capture_output=True, text=True, env=settings, timeout=TIMEOUT_SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results, logits = json.loads(Path(files[1]).read_text(encoding="utf-8")), load_file(files[2])
    return {
        key: (result, [logits[f"{number}.{index}"] for index in range(len(result["answers"]))])
        for number, (key, result) in enumerate(zip(asked, results, strict=True))
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_it_loads_with_every_parameter_and_in_four_bits(kind: str, found: Found) -> None:
    result, _ = found[BUILD, kind]
    assert result["class"] == CLASSES[kind]
    assert result["missing"] == [] and result["unexpected"] == []
    assert len(result["linears"]) == NUM_LINEARS and set(result["linears"].values()) == {"QuantLinear"}
    assert all("language_model.layers." in name or name.startswith("model.layers.") for name in result["linears"])
    assert found[REFERENCE, kind][0]["linears"] == {}


@pytest.mark.parametrize("kind", CLASSES)
def test_it_answers_as_the_same_weights_do_in_bf16(kind: str, found: Found) -> None:
    (built, ours), (dequantized_build, theirs) = found[BUILD, kind], found[REFERENCE, kind]
    assert built["answers"] == dequantized_build["answers"]
    assert len(ours) >= 4 and all(len(logits) > 3 for logits in ours)
    for one, other in zip(ours, theirs, strict=True):
        assert float(one.abs().max()) > 8
        assert float((one - other).abs().max()) <= LOGIT_STEPS


def test_both_classes_say_the_same(found: Found) -> None:
    first, second = (found[BUILD, kind][0]["answers"] for kind in CLASSES)
    assert first[: len(second)] == second
