"""Scales of activations by the weights that make these."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import Edit
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.comparison.scale_bounds import scale_bounds
from mtpress.plan.recipe import load_recipe
from mtpress.quant_config.view import Subject
from mtpress.rules.rule import apply
from mtpress.rules.scale_bounds import RULES
from mtpress.stages.quantize import quantize

ATTENTION = "model.language_model.layers.3.self_attn."


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mtpress-tiny in NVFP4 and FP8, with measured scales of inputs and of the cache."""
    out = tmp_path_factory.mktemp("measured") / "made"
    recipe = load_recipe("nvfp4-fp8-vlm")
    quantize(BUILTIN_MODEL, out, recipe.model_copy(update={"kv_cache": "fp8"}), calibration=["builtin"], silent=True)
    return out


def found_of(path: Path) -> set[str]:
    return {finding.id for finding in apply(RULES, scale_bounds(Subject(Checkpoint.open(path)), Checkpoint.open(BUILTIN_MODEL)))}


def test_what_samples_show_lies_within(measured: Path) -> None:
    found = scale_bounds(Subject(Checkpoint.open(measured)), Checkpoint.open(BUILTIN_MODEL))
    assert len(found.bounds) == 27
    assert not found.unbounded
    assert all(b.low < b.amax < b.high for b in found.bounds.values())
    assert found_of(measured) == set()


def times(factor: float, *suffixes: str) -> Callable[[str, torch.Tensor], torch.Tensor]:
    return lambda name, scale: scale * factor if name.endswith(suffixes) else scale


INPUTS = "input_scale"
CASES: dict[str, tuple[str, Callable[[str, torch.Tensor], torch.Tensor]]] = {
    "inputs / 10": ("scale-too-small", times(0.1, INPUTS)),
    "inputs / 100": ("scale-too-small", times(0.01, INPUTS)),
    "inputs / 10000": ("scale-too-small", times(1e-4, INPUTS)),
    "inputs × 100": ("scale-large", times(100, INPUTS)),
    "inputs × 1000": ("scale-too-large", times(1000, INPUTS)),
    "inputs of attention / 100": ("scale-too-small", times(0.01, "q_proj.input_scale", "k_proj.input_scale", "v_proj.input_scale")),
    "inputs of down_proj / 1000": ("scale-too-small", times(1e-3, "down_proj.input_scale")),
    "one down_proj / 60": ("scale-too-small", times(1 / 60, "layers.1.mlp.down_proj.input_scale")),
    "inputs of out_proj / 100": ("scale-too-small", times(0.01, "out_proj.input_scale")),
    "keys / 1000": ("scale-too-small", times(1e-3, "k_scale")),
    "values / 1000": ("scale-too-small", times(1e-3, "v_scale")),
    "keys × 10^6": ("scale-too-large", times(1e6, "k_scale")),
    "values 10^30": ("scale-too-large", times(1e30, "v_scale")),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_scale_far_from_what_the_weights_make_is_found(case: str, measured: Path, tmp_path: Path) -> None:
    expected, change = CASES[case]
    edit = Edit(Path(shutil.copytree(measured, tmp_path / "changed")))
    edit.tensors = {name: change(name, tensor) for name, tensor in edit.tensors.items()}
    edit.save()
    assert expected in found_of(edit.path)


def test_a_default_is_let_be(measured: Path, tmp_path: Path) -> None:
    """vLLM takes 1 for a cache without scales; a build without samples has one number for all inputs."""
    edit = Edit(Path(shutil.copytree(measured, tmp_path / "changed")))
    for name in edit.tensors:
        if name.endswith(("k_scale", "v_scale")):
            edit.tensors[name] = torch.tensor(1.0)
    edit.save()
    assert found_of(edit.path) == set()
