"""convert against the real compressed-tensors 0.19 and llm-compressor 0.14: the same weights in both layouts, both ways.

compressed-tensors' own decompressor and this package's dequantization must agree on every weight, to the bit, once both are BF16:
of mtpress's build converted to compressed-tensors, and of llm-compressor's export converted to modelopt's layout.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.plan.recipe import load_recipe
from mtpress.stages.check import check
from mtpress.stages.convert import convert
from mtpress.stages.quantize import quantize
from real_exports import real_export

pytestmark = pytest.mark.oracle
SCRIPT = Path(__file__).with_name("compressed_tensors_dequantize.py")
QUESTION, BEGINNING = "What is 45 + 19?", "45 + 19 = "  # the sum is up to how an uncalibrated build rounds
Theirs = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def theirs(llmcompressor_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """theirs(checkpoint): what compressed-tensors dequantizes its linears to, BF16; further arguments go to the script."""
    folder = tmp_path_factory.mktemp("theirs")

    def run(checkpoint: Path, *arguments: str) -> dict[str, torch.Tensor]:
        out = folder / f"{checkpoint.parent.name}-{checkpoint.name}.safetensors"
        command = [str(llmcompressor_python), str(SCRIPT), str(checkpoint), str(out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(out)

    return run


def ours(path: Path) -> dict[str, torch.Tensor]:
    """BF16 weight of every NVFP4 linear in modelopt's layout."""
    checkpoint = Checkpoint.open(path)
    modules = [name.removesuffix(".weight_scale_2") for name in checkpoint.tensors if name.endswith(".weight_scale_2")]
    parts = ("weight", "weight_scale", "weight_scale_2")
    return {m: nvfp4.dequantize(*(checkpoint.read(f"{m}.{part}") for part in parts)).to(torch.bfloat16) for m in modules}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 10 and all(torch.equal(a[name], b[name]) for name in a)


def test_the_library_reads_what_convert_writes(theirs: Theirs, tmp_path: Path) -> None:
    recipe = load_recipe("nvfp4-mtp-vlm").model_copy(update={"constant_input_scale": 0.0037})
    quantize(BUILTIN_MODEL, tmp_path / "nvfp4", recipe, silent=True)
    convert(tmp_path / "nvfp4", tmp_path / "ct", "compressed-tensors", silent=True)
    answer = tmp_path / "answer.json"
    assert same(theirs(tmp_path / "ct", str(answer), QUESTION), ours(tmp_path / "nvfp4"))
    said = json.loads(answer.read_text())
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    assert said["answer"].startswith(BEGINNING)


def test_convert_reads_what_the_library_writes(theirs: Theirs, tmp_path: Path) -> None:
    source = real_export("llmcompressor")
    result = convert(source, tmp_path / "modelopt", "modelopt", silent=True)
    assert result.num_converted == 16 and not result.rescaled
    assert same(ours(tmp_path / "modelopt"), theirs(source))
    assert not [finding for finding in check(tmp_path / "modelopt").findings if finding.severity == "error"]


def test_what_the_library_does_not_share_is_refused_or_paid_for(theirs: Theirs, tmp_path: Path) -> None:
    """llm-compressor gives in_proj_qkv and in_proj_z global scales of their own."""
    source = real_export("llmcompressor-gdn")
    with pytest.raises(InputError, match=r"3 fused linears have unequal global scales .*in_proj_qkvz"):
        convert(source, tmp_path / "out", "modelopt", silent=True)
    result = convert(source, tmp_path / "out", "modelopt", rescale=True, silent=True)
    promised = {module: error for found in result.rescaled for module, error in found["relative_errors"].items()}
    assert len(promised) == 6 and 0.001 < max(promised.values()) < 0.05
    old, new = theirs(source), ours(tmp_path / "out")
    assert old.keys() == new.keys()
    for module, weight in old.items():
        error = ((new[module].double() - weight.double()).norm() / weight.double().norm()).item()
        # both sides are rounded to BF16, at other places once the scales are others
        assert error == pytest.approx(promised.get(module, 0.0), rel=0.05, abs=2e-3 if module in promised else 0.0)
    assert not [finding for finding in check(tmp_path / "out").findings if finding.severity == "error"]
