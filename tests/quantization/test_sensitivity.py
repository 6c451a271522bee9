"""What each fused linear loses in each format: against checkpoints that have only that linear in it, computed as eval computes them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import read_tensor
from mtpress.errors import InputError
from mtpress.evaluation.bodies import open_bodies
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.plan.budget import Choices, choices
from mtpress.plan.recipe import Recipe, parse_recipe
from mtpress.progress import Progress
from mtpress.quantization.sensitivity import Errors, Journaled, Layer, measure
from mtpress.stages.quantize import quantize, samples_of

CPU = torch.device("cpu")
NAMED = {"name": "mine", "summary": "x", "calibration": {"num_samples": 3, "max_seq_len": 48}}
BUDGET = parse_recipe({**NAMED, "rounding": "hessian", "budget": {"bytes": "6.6 MB", "candidates": ["bf16", "nvfp4", "fp8"]}}, "here")


@pytest.fixture(scope="module")
def found() -> Choices:
    return choices(Checkpoint.open(BUILTIN_MODEL), BUDGET)


def measured(found: Choices, folder: Path, resume: bool = False, made_of: Any = "this") -> Errors:
    folder.mkdir(exist_ok=True)
    samples = samples_of(found.least.source, found.recipe, ["builtin"]).samples
    journaled = Journaled(folder, {"of": made_of}, resume)
    with Progress("test", 1, silent=True) as progress:
        return measure(found.plans, samples, CPU, journaled, progress)


@pytest.fixture(scope="module")
def errors(found: Choices, tmp_path_factory: pytest.TempPathFactory) -> Errors:
    return measured(found, tmp_path_factory.mktemp("measured"))


@torch.no_grad()
def error_of(built: Path, layer: int, recipe: Recipe) -> float:
    """Mean over tokens of ‖ŷ − y‖² / ‖y‖² behind a layer of a stored checkpoint, its inputs those of the base."""
    base, (other,) = open_bodies(BUILTIN_MODEL, [built])
    samples = samples_of(base.checkpoint, recipe, ["builtin"]).samples
    mover = StreamedBody(base.checkpoint.config, CPU)
    mover.embed(samples, base.embedding_rows)
    for index in range(layer):
        start = f"{base.prefix}layers.{index}."
        mover.layer(index, {info.name.removeprefix(start): read_tensor(info) for info in base.layer_infos(index)})
    outputs = []
    for body in (base, other):
        module = body.layer(mover, layer, {info.name: read_tensor(info) for info in body.layer_infos(layer)})
        with mover.delta_rule(module):
            made = [mover.through(module, mover.states.get(i), mover.positions[i]) for i in range(len(samples))]
        outputs.append(torch.cat(made, dim=1).double())
    exact, rounded = outputs
    return float(((rounded - exact).square().sum(-1) / exact.square().sum(-1)).mean())


@pytest.mark.parametrize(
    ("linear", "name"),
    [
        ("layers.1.linear_attn.in_proj_qkvz", "nvfp4"),
        ("layers.3.self_attn.qkv_proj", "fp8"),
        ("layers.2.mlp.gate_up_proj", "fp8"),
        ("layers.3.mlp.down_proj", "nvfp4"),
    ],
)
def test_it_is_the_error_of_a_checkpoint_with_that_linear_alone(
    linear: str, name: str, found: Choices, errors: Errors, tmp_path: Path
) -> None:
    number, group = next((i, group) for i, group in enumerate(found.groups) if group.title == linear)
    overrides = {
        module: name if module in group.modules else "bf16"
        for of in found.groups
        for module in of.modules
        if of.component == group.component
    }
    alone = parse_recipe({**NAMED, "rounding": "hessian", "formats": {group.component: name}, "overrides": overrides}, "here")
    quantize(BUILTIN_MODEL, tmp_path / "out", alone, calibration=["builtin"], silent=True)
    assert errors[number][name] > 0
    assert errors[number][name] == pytest.approx(error_of(tmp_path / "out", group.layer, alone), rel=1e-9)


def test_every_linear_loses_more_in_four_bits_than_in_eight(found: Choices, errors: Errors) -> None:
    assert len(errors) == len(found.groups) == 16
    assert all(set(error) == {"nvfp4", "fp8"} and 3 * error["fp8"] < error["nvfp4"] < 0.1 for error in errors)


def test_it_goes_on_behind_the_last_layer_to_the_same_numbers(
    found: Choices, errors: Errors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[str] = []
    original = Layer.errors

    def stopped(self: Layer, jobs: Any) -> Errors:
        if len(passed) == 2:
            raise KeyboardInterrupt
        passed.append(self.title)
        return original(self, jobs)

    monkeypatch.setattr(Layer, "errors", stopped)
    with pytest.raises(KeyboardInterrupt):
        measured(found, tmp_path / "run")
    with (tmp_path / "run" / "sensitivity.lines").open("a") as file:
        file.write('[{"nvfp4": 0.1')  # torn
    monkeypatch.setattr(Layer, "errors", lambda self, jobs: passed.append(self.title) or original(self, jobs))
    assert measured(found, tmp_path / "run", resume=True) == errors
    assert passed == ["layer 0", "layer 1", "layer 2", "layer 3"]
    assert measured(found, tmp_path / "run", resume=True) == errors and len(passed) == 4
    with pytest.raises(InputError, match="was begun with of this, not that"):
        Journaled(tmp_path / "run", {"of": "that"}, resume=True, begun=True)
    assert not Journaled(tmp_path / "run", {"of": "that"}, resume=True).layers
