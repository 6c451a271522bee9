"""Whatever is broken in a fine-tune, repair with its ancestor neither changes nor drops a number that it holds.

Every way to break a checkpoint (tests/breaks.py, tests/format_breaks.py) × every kind of fine-tune × the base that it was made from.
What may change is how a weight is stored: its name, its layout, its format; 4-bit codes may become the BF16 numbers that they stand for.
What is damaged, by the findings of check, may become the ancestor's. `make soak` tries all of them, `make test` a sample.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from broken_classes import ALL, VLM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from checkpoints import SMALL_FORMATS, Edit, weight_only, write_small
from fine_tunes import FINE_TUNES
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import read_tensor
from mtpress.comparison.weights import IN_THE_MODEL
from mtpress.errors import InputError
from mtpress.quant_config.stored import WEIGHT
from mtpress.quant_config.stored_matrix import stored_matrix
from mtpress.quant_config.view import Subject
from mtpress.stages.check import check
from mtpress.stages.quantize import quantize
from mtpress.stages.repair import repair
from trainer_layouts import RENAMED, UNPLACED, Layout


def stored_as(layout: Layout) -> Callable[[Edit], object]:
    return lambda e: setattr(e, "tensors", {name: tensor.contiguous() for name, tensor in layout(e.tensors).items()})


SOAK = os.environ.get("MTPRESS_SOAK") == "1"
KINDS = [kind for kind in FINE_TUNES if kind != "trained in float32"]  # quantize rounds that one: as any other from there on
# Findings that say that a tensor is no number of anyone's: scales that are missing or none, another shape or dtype, a packed head.
DAMAGE = {
    "scale-missing", "scale-unsound", "scale-implausible", "weight-shape", "weight-dtype", "k-not-divisible", "mtp-quantized",
    "mtp-rounded",
}  # fmt: skip
# The tensors of a BF16 checkpoint, and of an NVFP4 one with its scales, under names and in layouts that are not the family's.
LAYOUTS = [
    (f"{form}: {how}", form, set[str](), stored_as(layout))
    for form in ("bf16", VLM)
    for how, layout in (RENAMED | UNPLACED).items()
    if form == "bf16" or how in ("attention by other words", "w1, w3 and w2", "layers by other words", "a head of other words")
]
CASES = ALL + LAYOUTS
ROUNDING = 2.0**-8  # of a BF16 number


def stored_bytes(path: Path) -> set[tuple[str, torch.Size, bytes]]:
    stored = (t for file in path.glob("*.safetensors") for t in load_file(file).values() if t.dim() and t.view(-1).view(torch.uint8).any())
    return {(str(t.dtype), t.shape, t.view(torch.uint8).numpy().tobytes()) for t in stored}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fine-tunes")


@cache
def made(place: Path, kind: str, form: str) -> tuple[Path, Path]:
    """(the ancestor, a fine-tune of it in a format)."""
    base = place / "base"
    if not base.exists():
        write_small(base)
    if form == "bf16":
        source = Path(shutil.copytree(base, place / f"{kind}-bf16"))
        save_file(FINE_TUNES[kind](load_file(base / "model.safetensors")), source / "model.safetensors", metadata={"format": "pt"})
        return base, source
    out = place / f"{kind}-{form}"
    if form == VLM:
        quantize(made(place, kind, "bf16")[1], out, weight_only(VLM), silent=True)
        return base, out
    return base, SMALL_FORMATS[form](made(place, kind, "bf16")[1], made(place, kind, VLM)[1], out)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Name within the model → the numbers that a tensor stands for, of everything that stands for any; float32."""
    try:
        subject = Subject(Checkpoint.open_stored(path))
    except InputError:  # a torn file that no index names
        subject = Subject(Checkpoint.open(path))
    found: dict[str, torch.Tensor] = {}
    for module, tensors in subject.modules.items():
        form = subject.form(module)
        if form == "plain":
            found |= {info.name: read_tensor(info).float() for info in tensors.values() if info.dtype in ("BF16", "F32")}
        elif form not in ("none", "unknown") and (matrix := stored_matrix(form, tensors)) is not None:
            rows, _ = matrix.load()
            found[f"{module}.{WEIGHT}"] = rows(0, matrix.shape[0])
    return {match[1]: tensor for name, tensor in found.items() if (match := IN_THE_MODEL.search(name))}


def damaged(path: Path) -> set[str]:
    """Names within the model of the weights that check calls damaged."""
    names = {name for finding in check(path, silent=True).findings if finding.id in DAMAGE for name in finding.where}
    spelled = {n for name in names for n in (name, f"{name}.{WEIGHT}", f"{name.rpartition('.')[0]}.{WEIGHT}")}
    return {found[1] for name in spelled if (found := IN_THE_MODEL.search(name))}


def keeps_every_number(place: Path, kind: str, case: tuple[str, str, set[str], Callable[[Edit], object]]) -> None:
    name, form, _, break_it = case
    base, source = made(place, kind, form)
    with TemporaryDirectory(dir=place) as folder:
        broken = Path(shutil.copytree(source, Path(folder) / "broken"))
        edit = Edit(broken)
        break_it(edit)
        edit.save()
        excused, shapes = damaged(broken), {n: t.shape for n, t in weights(base).items()}
        before = {n: t for n, t in weights(broken).items() if t.shape == shapes.get(n) and n not in excused}
        try:
            result = repair(broken, Path(folder) / "out", base, silent=True)
        except InputError:
            return
        kept = Path(folder) / "out" if result.written else broken
        assert case not in LAYOUTS or stored_bytes(broken) <= stored_bytes(kept), f"{name} of {kind}: dropped or replaced"
        after = weights(kept)
        lost = sorted(before.keys() - after.keys())
        assert not lost, f"{name} of {kind}: dropped {lost}"
        for weight, numbers in before.items():
            there = numbers.isfinite()
            far = (after[weight] - numbers)[there].abs() > ROUNDING * numbers[there].abs()
            assert not bool(far.any()), f"{name} of {kind}: {weight} changed in {int(far.sum())} of {far.numel()} numbers"


@pytest.mark.skipif(SOAK, reason="the whole list is tried")
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS[:2]), case=st.sampled_from(CASES))
def test_a_broken_fine_tune_keeps_every_number(place: Path, kind: str, case: tuple[str, str, set[str], Callable[[Edit], object]]) -> None:
    keeps_every_number(place, kind, case)


@pytest.mark.skipif(not SOAK, reason="make soak")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_every_broken_fine_tune_keeps_every_number(
    place: Path, kind: str, case: tuple[str, str, set[str], Callable[[Edit], object]]
) -> None:
    keeps_every_number(place, kind, case)
