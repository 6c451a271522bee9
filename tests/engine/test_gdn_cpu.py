"""The plugin for Gated DeltaNet on the CPU: strides by themselves, and rows of drafts inside the pinned vLLM."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtpress.engine.plugins.gdn_cpu import in_full_rows, transposed

SCRIPT = Path(__file__).with_name("gdn_on_cpu.py")
CHANNELS = 6


def one_token() -> Tensor:
    """[channels, 1], cut out of a wider projection: contiguous by PyTorch's rules, with the projection's stride."""
    return torch.randn(3, 2 * CHANNELS)[1:2, :CHANNELS].contiguous().t()


@pytest.mark.parametrize("x", [one_token(), torch.randn(4, CHANNELS).t(), torch.randn(CHANNELS, 4)], ids=["one", "tokens", "untransposed"])
def test_the_native_kernel_gets_the_strides_that_it_asks_for(x: Tensor) -> None:
    def convolve(x: Tensor, weight: str, *, bias: str) -> tuple[Tensor, str, str]:
        assert x.stride() == (1, x.shape[0])
        return x, weight, bias

    found, *others = transposed(convolve)(x, "weight", bias="bias")
    assert torch.equal(found, x)
    assert others == ["weight", "bias"]
    assert found is x or x.stride() != (1, x.shape[0])  # no copy where there is nothing to mend


class Metadata:
    """A stand-in for vLLM's dataclass, with the two fields that are read."""

    def __init__(self, lengths: list[int]) -> None:
        self.num_spec_decodes = len(lengths)
        self.spec_query_start_loc = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.mark.parametrize("lengths", [[4, 4], [0, 4]])
def test_full_rows_go_through_as_they_are(lengths: list[int]) -> None:
    given: list[Any] = []

    def speculate(*arguments: Any) -> str:
        given.extend(arguments)
        return "out"

    mixed = torch.randn(sum(lengths), CHANNELS)
    metadata = Metadata(lengths)
    assert in_full_rows(speculate)("layer", metadata, mixed, "b", "a", "conv", "ssm", 4, 6) == "out"
    assert given[0] == "layer"
    assert given[1] is metadata
    assert given[2] is mixed
    assert given[3:] == ["b", "a", "conv", "ssm", 4, 6]


@pytest.fixture(scope="module")
def found(engine_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    def ask(how: str) -> dict[str, Any]:
        answered = tmp_path_factory.mktemp(how) / "found.json"
        done = subprocess.run([str(engine_python), str(SCRIPT), how, str(answered)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(answered.read_text()))

    return ask


@pytest.mark.engine
def test_stock_vllm_needs_it(found: Callable[[str], dict[str, Any]]) -> None:
    """Once a later vLLM is right, this file and the plugin can go."""
    stock = found("stock")
    assert stock["short"] > 0.1
    assert "size of tensor" in stock["cut"]
    assert "expect x to be transposed" in stock["native"]


@pytest.mark.engine
def test_short_rows_are_computed_as_full_ones_with_it(found: Callable[[str], dict[str, Any]]) -> None:
    mended = found("mended")
    assert mended["short"] < 0.01
    assert mended["cut"] < 0.01
    assert mended["native"] == 0
