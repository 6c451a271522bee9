"""Checkpoints that tests of several folders start from; they are made once and never changed."""

from pathlib import Path

import pytest

from checkpoints import SMALL_FORMATS, weight_only, write_small
from mtpress.plan.recipe import load_recipe, shipped
from mtpress.stages.quantize import quantize


@pytest.fixture(scope="session")
def small_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small BF16 checkpoint of tests/checkpoints.py."""
    return write_small(tmp_path_factory.mktemp("small") / "bf16")


@pytest.fixture(scope="session")
def small_nvfp4(small_bf16: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recipe of NVFP4 → what quantize makes of the small checkpoint, weight-only."""
    made = {}
    for name in (recipe for recipe in shipped() if load_recipe(recipe).format == "nvfp4"):
        made[name] = tmp_path_factory.mktemp("small-nvfp4") / name
        quantize(small_bf16, made[name], weight_only(name), silent=True)
    return made


@pytest.fixture(scope="session")
def small_formats(small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format of checkpoints.SMALL_FORMATS → a sound checkpoint in it, of the same weights."""
    folder = tmp_path_factory.mktemp("small-formats")
    return {kind: write(small_bf16, small_nvfp4["nvfp4-mtp-vlm"], folder / kind) for kind, write in SMALL_FORMATS.items()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a peer's environment comes last: `make test` makes those while the other files are tried."""
    items.sort(key=lambda item: bool({"engine", "oracles"} & set(item.path.parts)))
