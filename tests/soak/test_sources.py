"""Every recipe on sources of every kind: an output that check finds no error in, or one line, exit code 2 and nothing written.

`make soak` tries hundreds of pairs; the ordinary suite a sample, the same each time.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import Edit, weight_only
from mtpress.builtin import BUILTIN_MODEL
from mtpress.errors import InputError
from mtpress.plan.recipe import Recipe, load_recipe, shipped
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize
from source_traits import TRAITS

FULL, SAMPLE = 400, 18
SAMPLES = '{"text": "The quick brown fox jumps over the lazy dog."}\n{"text": "Water boils at one hundred degrees."}\n'


def quick(name: str) -> Recipe:
    """A shipped recipe at the least work that makes the same layout."""
    recipe = load_recipe(name)
    if recipe.format == "nvfp4":
        return weight_only(name)
    return recipe.model_copy(update={"rounding": "rtn", "gptq": None}) if recipe.format == "int4" else recipe


RECIPES = {name: quick(name) for name in shipped() if load_recipe(name).budget is None}
SEEN: Counter[str] = Counter()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "samples.jsonl").write_text(SAMPLES)
    yield folder
    print(f"recipes on sources: {SEEN.total()} cases, {SEEN['made']} outputs without an error, {SEEN['refused']} refused")


def source_with(traits: list[str], folder: Path) -> Path:
    """mtpress-tiny with these traits, each put upon those before."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(BUILTIN_MODEL, folder)
    edit = Edit(folder)
    for name in traits:
        TRAITS[name](edit)
    edit.save()
    return folder


def outcome(source: Path, out: Path, recipe: Recipe, dequantize: bool, samples: Path) -> str:
    """ "made" or "refused"; AssertionError for anything else."""
    chosen = recipe.model_copy(update={"dequantize": dequantize})
    try:
        quantize(source, out, chosen, calibration=[str(samples)], device="cpu", silent=True)
    except InputError as error:
        assert "\n" not in str(error)
        assert not out.exists()
        assert not out.with_name(f"{out.name}.partial").exists()
        return "refused"
    errors = [f"{f.id}: {f.message}" for f in check(out, source, silent=True).findings if f.severity == "error"]
    assert errors == []
    return "made"


@pytest.mark.parametrize("name", sorted(TRAITS))
def test_one_trait(name: str, place: Path) -> None:
    source, out = source_with([name], place / "one"), place / "out"
    shutil.rmtree(out, ignore_errors=True)
    SEEN[outcome(source, out, RECIPES["nvfp4-mtp-vlm"], True, place / "samples.jsonl")] += 1


@settings(
    max_examples=FULL if os.environ.get("MTPRESS_SOAK") == "1" else SAMPLE, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    traits=st.lists(st.sampled_from(sorted(TRAITS)), max_size=3, unique=True),
    dequantize=st.booleans(),
)
def test_no_recipe_makes_an_output_with_an_error(recipe: str, traits: list[str], dequantize: bool, place: Path) -> None:
    source, out = source_with(traits, place / "source"), place / "out"
    shutil.rmtree(out, ignore_errors=True)
    SEEN[outcome(source, out, RECIPES[recipe], dequantize, place / "samples.jsonl")] += 1
