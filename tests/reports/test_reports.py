"""Every reported input through check, quantize, repair and eval: what they say stands in docs/reports.md, and no weight is lost."""

import hashlib
from pathlib import Path

import pytest
import torch
from reported_inputs import REPORTED, Reported
from reported_verdicts import HEADER, Verdicts, ask
from safetensors.torch import load_file

PLAIN = (torch.bfloat16, torch.float16, torch.float32)
DOCUMENT = Path(__file__).parents[2] / "docs/reports.md"


def rows() -> list[str]:
    lines = DOCUMENT.read_text().splitlines()
    start = lines.index(HEADER[0])
    return [line for line in lines[start + 2 : start + 2 + len(REPORTED)] if line.startswith("| ")]


@pytest.mark.parametrize("reported", REPORTED, ids=lambda reported: reported.name)
def test_the_stages_say_what_the_document_says(reported: Reported, tmp_path: Path) -> None:
    said = ask(reported, tmp_path)
    assert said.row == rows()[REPORTED.index(reported)]
    assert "/" not in said.repair.replace("docs/", "").replace("mtp/weights", ""), "no path of this machine"
    assert_sound_where_it_ends_well(said)
    assert_no_weight_is_lost(said)


def assert_sound_where_it_ends_well(said: Verdicts) -> None:
    """No stage makes a checkpoint in which check finds an error."""
    assert said.quantize.startswith("refuses: ") or "**not sound**" not in said.quantize


def assert_no_weight_is_lost(said: Verdicts) -> None:
    """Every finite matrix in 16 or 32 bits is in what repair made, under whatever name, or in BF16 where it was wider."""
    if said.repaired is None or said.reported.name.startswith("stray"):
        return
    made = {digest(tensor) for tensor in stored(said.repaired).values()}
    for name, tensor in stored(said.path).items():
        if tensor.ndim < 2 or tensor.dtype not in PLAIN or not is_finite(tensor) or "scale" in name.rpartition(".")[2]:
            continue
        forms = [tensor, tensor.to(torch.bfloat16)] if tensor.dtype in (torch.float16, torch.float32) else [tensor]
        assert any(digest(form) in made for form in forms), name


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.rglob("*.safetensors")) for name, tensor in load_file(file).items()}


def is_finite(tensor: torch.Tensor) -> bool:
    return bool(tensor.float().isfinite().all()) if tensor.is_floating_point() else True


def digest(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, str]:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tensor.shape, hashlib.sha256(content).hexdigest()
