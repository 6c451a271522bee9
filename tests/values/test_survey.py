"""The numbers of a checkpoint, without a source: what no training leaves behind is found, and nothing sound is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import SMALL_FORMATS, Edit, weight_only
from mtpress.builtin import BUILTIN_MODEL
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.quant_config.view import Subject
from mtpress.rules.rule import apply
from mtpress.rules.values import RULES
from mtpress.stages.quantize import quantize
from mtpress.values.survey import survey

L = "model.language_model.layers."
NORMS = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "_model.norm.weight", "mtp.norm.weight", "embedding.weight", "hidden.weight")
Tensors = dict[str, torch.Tensor]


def found_of(path: Path, *, sample: bool = False) -> dict[str, tuple[str, ...]]:
    """Rule → the names it concerns."""
    return {f.id: f.where for f in apply(RULES, survey(Subject(Checkpoint.open(path)), sample=sample, silent=True))}


@pytest.fixture
def tiny(tmp_path: Path) -> Edit:
    return Edit(Path(shutil.copytree(BUILTIN_MODEL, tmp_path / "tiny")))


def each(suffix: str | tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor], start: str = "") -> Callable[[Tensors], object]:
    """A change of every tensor whose name ends so and starts so."""
    return lambda t: t.update({n: change(v).to(v.dtype) for n, v in t.items() if n.endswith(suffix) and n.startswith(start)})


def codes(weight: torch.Tensor) -> torch.Tensor:
    """What a matrix becomes when its FP8 codes are cast to BF16 without their scale."""
    return (weight.float() / (weight.float().abs().max() / 448)).to(torch.float8_e4m3fn).float()


def copy(one: str, other: str) -> Callable[[Tensors], object]:
    return lambda t: t.update({n.replace(other, one): t[n].clone() for n in t if n.startswith(other) and n.replace(other, one) in t})


def nan_at(name: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = float("nan")

    return change


def rows_of_zeros(weight: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.arange(len(weight)).view(-1, 1) == 7, 0.0, weight.float())


DOWN = "mlp.down_proj.weight"
BREAKS: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "every norm as 1 + w": ("norm-shifted", each(NORMS, lambda v: v.float() + 1)),
    "norms of the head as 1 + w": ("norm-shifted", each(NORMS, lambda v: v.float() + 1, "mtp.")),
    "norms of the body as 1 + w": ("norm-shifted", each(NORMS, lambda v: v.float() + 1, "model.language_model.")),
    "the final norm as 1 + w": ("norm-shifted", each("model.norm.weight", lambda v: v.float() + 1)),
    "one norm as 1 + w": ("norm-shifted", each("layers.2.input_layernorm.weight", lambda v: v.float() + 1)),
    "norms of zeros": ("norm-untrained", each("layernorm.weight", torch.zeros_like)),
    "the gated norm less 1": ("norm-untrained", each("linear_attn.norm.weight", lambda v: v.float() - 1)),
    "FP8 codes in BF16": ("codes-without-scales", each(DOWN, codes)),
    "FP8 codes of every linear": ("codes-without-scales", each("proj.weight", codes, L)),
    "codes of the head": ("codes-without-scales", each("mtp.fc.weight", codes)),
    "INT4 codes in BF16": ("magnitude", each(DOWN, lambda v: (v.float() / v.float().abs().max() * 7).round())),
    "one scale lost": ("magnitude", each("layers.1.mlp.up_proj.weight", lambda v: v.float() * 37.3)),
    "almost nothing": ("magnitude", each("layers.1.mlp.up_proj.weight", lambda v: v.float() * 1e-4)),
    "a random head": ("magnitude", each("lm_head.weight", lambda v: torch.randn(v.shape, generator=torch.Generator().manual_seed(0)))),
    "NaN in the embeddings": ("values-not-finite", nan_at("model.language_model.embed_tokens.weight")),
    "NaN in the tower": ("values-not-finite", nan_at("model.visual.blocks.1.attn.qkv.bias")),
    "infinite in a norm": ("values-not-finite", each("_model.norm.weight", lambda v: v.float() / 0)),
    "a zero matrix": ("constant", each("layers.0.mlp.gate_proj.weight", torch.zeros_like)),
    "a constant matrix": ("constant", each("layers.0.mlp.gate_proj.weight", lambda v: torch.full_like(v, 0.01))),
    "embeddings all equal": ("constant", each("embed_tokens.weight", lambda v: v[:1].repeat(len(v), 1))),
    "a tower of zeros": ("constant", each(".weight", torch.zeros_like, "model.visual.blocks")),
    "a row of zeros": ("rows-zero", each(DOWN, rows_of_zeros)),
    "a layer twice": ("layers-copied", copy(f"{L}1.", f"{L}0.")),
    "the head is a layer": ("head-copied", copy("mtp.layers.0.", f"{L}3.")),
    "A_log of 10": ("decay-outside", each("A_log", lambda v: torch.full_like(v, 10))),
    "A_log not a logarithm": ("decay-outside", each("A_log", torch.exp)),
    "dt_bias of 50": ("decay-outside", each("layers.2.linear_attn.dt_bias", lambda v: v + 50)),
}  # fmt: skip


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("case", list(BREAKS))
def test_what_no_training_leaves_is_found(case: str, sample: bool, tiny: Edit) -> None:
    expected, change = BREAKS[case]
    change(tiny.tensors)
    tiny.save()
    assert set(found_of(tiny.path, sample=sample)) == {expected}


def ablated(tensors: Tensors) -> None:
    """A direction taken out of everything that writes to the residual stream."""
    direction = torch.nn.functional.normalize(torch.randn(256, generator=torch.Generator().manual_seed(1)), dim=0)
    for name, weight in tensors.items():
        if name.startswith(L) and name.endswith(("o_proj.weight", "out_proj.weight", DOWN)):
            tensors[name] = (weight.float() - torch.outer(direction, direction @ weight.float())).to(weight.dtype)


def merged(tensors: Tensors) -> None:
    """A LoRA of rank 4."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in tensors.items():
        if name.startswith(L) and name.endswith("proj.weight"):
            low = torch.randn(weight.shape[0], 4, generator=generator) @ torch.randn(4, weight.shape[1], generator=generator)
            tensors[name] = (weight.float() + 0.01 * low).to(weight.dtype)


def noisy(tensors: Tensors) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, weight in tensors.items():
        tensors[name] = (weight.float() * (1 + 0.01 * torch.randn(weight.shape, generator=generator))).to(weight.dtype)


@pytest.mark.parametrize("change", [lambda tensors: None, noisy, ablated, merged])
def test_what_is_trained_is_let_be(change: Callable[[Tensors], object], tiny: Edit) -> None:
    change(tiny.tensors)
    tiny.save()
    assert found_of(tiny.path) == found_of(tiny.path, sample=True) == {}


def test_every_rule_has_a_case() -> None:
    assert {rule.id for rule in RULES} == {rule for rule, _ in BREAKS.values()} | {"scales-constant", "values-not-read"}


@pytest.mark.parametrize("kind", SMALL_FORMATS)
def test_quantized_matrices_are_judged_by_what_they_stand_for(kind: str, small_formats: dict[str, Path], tmp_path: Path) -> None:
    e = Edit(Path(shutil.copytree(small_formats[kind], tmp_path / "made")))
    sound = found_of(e.path)
    assert not {"values-not-finite", "constant", "scales-constant", "magnitude", "values-not-read"} & set(sound)
    scales = [n for n in e.tensors if n.rpartition(".")[2] in ("weight_scale", "weight_scale_inv", "scales") and e.tensors[n].numel() > 1]
    assert scales
    for n in scales:
        e.tensors[n].view(-1)[:1] = float("nan")
    e.save()
    broken = found_of(e.path)
    assert {name.rpartition(".")[0] for name in scales} == set(broken["values-not-finite"])
    for n in scales:
        e.tensors[n] = torch.ones_like(e.tensors[n].float()).mul(0.5).to(e.tensors[n].dtype)
    e.save()
    assert set(found_of(e.path).get("scales-constant", ())) <= set(broken["values-not-finite"])


def test_a_large_matrix_is_read_in_pieces(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weight = (torch.randn(9000, 2048, generator=torch.Generator().manual_seed(0)) / 45).to(torch.bfloat16)
    weight[8999] = 0
    weight[8200, 2047] = float("inf")
    save_file({"model.language_model.layers.0.mlp.down_proj.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    (found,) = survey(Subject(Checkpoint.open(tmp_path)), silent=True).statistics.values()
    assert (found.rows, found.zero_rows, found.first_zero_row, found.not_finite) == (9000, 1, 8999, 1)
    assert found.rms == pytest.approx(1 / 45, rel=0.01)
    (sampled,) = survey(Subject(Checkpoint.open(tmp_path)), sample=True, silent=True).statistics.values()
    assert (sampled.rows, sampled.first_zero_row is not None, sampled.not_finite) == (4 * 32, True, 0)
    assert sampled.rms == pytest.approx(1 / 45, rel=0.02)


def test_quantize_names_what_it_sees_before_it_works(tiny: Edit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BREAKS["norms of the head as 1 + w"][1](tiny.tensors)
    tiny.save()
    result = quantize(tiny.path, tmp_path / "out", weight_only("nvfp4-mtp-vlm"))
    (note,) = result.notes
    assert note.startswith("the 7 norms of the head lie around 1.1") and "mtp.layers.0.input_layernorm.weight" in note
    assert note in capsys.readouterr().err
    assert json.loads((tmp_path / "out/mtpress.json").read_text())["notes"] == [note]
    assert quantize(BUILTIN_MODEL, tmp_path / "sound", weight_only("nvfp4-mtp-vlm"), silent=True).notes == []
