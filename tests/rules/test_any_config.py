"""Whatever stands in the JSON files, check says something: findings, or one line that there is nothing to check."""

import copy
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtpress.checkpoint.checkpoint import INDEX_NAME
from mtpress.errors import InputError
from mtpress.stages.check import check

FILES = ("config.json", "hf_quant_config.json", "tokenizer_config.json", "generation_config.json", INDEX_NAME)
VALUES: tuple[Any, ...] = (None, -1, 10**30, "x", [], [["a"], None], {"a": 1})
REMOVED = object()
SOAK = bool(os.environ.get("MTPRESS_SOAK"))  # all values in every place; otherwise half of them in each


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document, the whole first; of a long list or map the first few."""
    yield at
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for number, (key, value) in enumerate(inner):
        if len(at) == 0 or number < 24:
            yield from places(value, (*at, key))


def replaced(content: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return [] if value is REMOVED else value
    changed = copy.deepcopy(content)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    return changed


@pytest.mark.parametrize("name", FILES)
def test_no_value_is_too_odd(name: str, small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "odd"))
    content = json.loads((path / name).read_text())
    if name == "config.json":
        content["text_config"]["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    assert num_findings(path, name, content, places(content)) > 0


def num_findings(path: Path, name: str, content: Any, wheres: Iterable[tuple[Any, ...]]) -> int:
    """How many findings check has over all contents of a file that hold something odd in one place."""
    found = 0
    odd = (*VALUES, REMOVED)
    for number, at in enumerate(wheres):
        for value in odd if SOAK else odd[number % 2 :: 2]:
            (path / name).write_text(json.dumps(replaced(content, at, value)))
            try:
                found += len(check(path).findings)
            except InputError as error:
                assert "model_type" in str(error)
    return found


@pytest.mark.parametrize(
    "kind", ["compressed-tensors", "compressed-tensors-int4", "auto-round", "gptq", "modelopt-mixed", "fp8", "compressed-tensors-mixed"]
)
def test_no_quantization_config_is_too_odd(kind: str, small_formats: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(small_formats[kind], tmp_path / "odd"))
    content = json.loads((path / "config.json").read_text())
    said = content["quantization_config"]
    if kind == "gptq":
        said |= {"dynamic": {"-:.*mtp.*": {"bits": 8}}, "modules_in_block_to_quantize": [["mlp.", "self_attn."]]}
    wheres = [("quantization_config", *at) for at in places(said)]
    assert num_findings(path, "config.json", content, wheres) > 0
