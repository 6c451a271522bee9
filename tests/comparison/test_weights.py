"""Weights against their source: what was kept bit for bit, and how far the rest is."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import FP8_BLOCK, PREFIX, SMALL_FORMATS, Edit, quantizable, write_small
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.comparison.weights import compare, relative_error, same_bytes
from mtpress.formats import fp8, int4, nvfp4
from mtpress.quant_config.view import Subject
from mtpress.rules.against_source import RULES
from mtpress.rules.rule import apply

OUT_PROJ = f"{PREFIX}layers.0.linear_attn.out_proj"


def test_errors_are_those_of_the_dequantized_weights(small_bf16: Path, small_nvfp4: dict[str, Path]) -> None:
    path = small_nvfp4["nvfp4-mtp-vlm"]
    found = compare(Subject(Checkpoint.open(path)), Checkpoint.open(small_bf16), silent=True)
    source, made = load_file(small_bf16 / "model.safetensors"), load_file(path / "model.safetensors")
    modules = {name.removesuffix(".weight_scale") for name in made if name.endswith(".weight_scale")}
    assert found.error.keys() == modules
    for module, error in found.error.items():
        weight = source[f"{module}.weight"].double()
        parts = (made[f"{module}.{suffix}"] for suffix in ("weight", "weight_scale", "weight_scale_2"))
        expected = (nvfp4.dequantize(*parts).double() - weight).norm() / weight.norm()
        assert error == pytest.approx(float(expected), rel=1e-5)
    assert found.num_equal == len(source) - len(modules)
    assert not found.differing + found.absent + found.not_compared
    assert list(apply(RULES, found)) == []


def dequantized(kind: str, made: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """float32 [N, K], by the formats' own functions."""
    if kind.startswith("compressed-tensors-int4"):
        codes, scales = made[f"{module}.weight_packed"], made[f"{module}.weight_scale"]
        return int4.dequantize(codes.t(), int4.zeros(*scales.shape), scales.t())
    if (inverse := made.get(f"{module}.weight_scale_inv")) is not None:
        return fp8.dequantize(made[f"{module}.weight"], inverse, (FP8_BLOCK, FP8_BLOCK))
    if kind in ("modelopt-mixed", "compressed-tensors-mixed") and ".mlp." not in module:
        return fp8.dequantize(made[f"{module}.weight"], made[f"{module}.weight_scale"])
    if kind.startswith("compressed-tensors"):
        shared = 1 / made[f"{module}.weight_global_scale"].reshape(())
        return nvfp4.dequantize(made[f"{module}.weight_packed"], made[f"{module}.weight_scale"], shared)
    if kind == "modelopt-mixed":
        return nvfp4.dequantize(*(made[f"{module}.{suffix}"] for suffix in ("weight", "weight_scale", "weight_scale_2")))
    return int4.dequantize(*(made[f"{module}.{suffix}"] for suffix in ("qweight", "qzeros", "scales")))


@pytest.mark.parametrize("kind", SMALL_FORMATS)
def test_errors_of_other_formats(kind: str, small_bf16: Path, small_formats: dict[str, Path]) -> None:
    found = compare(Subject(Checkpoint.open(small_formats[kind])), Checkpoint.open(small_bf16), silent=True)
    source, made = load_file(small_bf16 / "model.safetensors"), load_file(small_formats[kind] / "model.safetensors")
    assert found.error.keys() == set(quantizable(source))
    assert found.int4 == (set(found.error) if kind in ("auto-round", "gptq", "compressed-tensors-int4") else set())
    for module, error in found.error.items():
        weight = source[f"{module}.weight"].double()
        expected = (dequantized(kind, made, module).double() - weight).norm() / weight.norm()
        assert error == pytest.approx(float(expected), rel=1e-5)
    in_fp8 = {name for name in found.error if kind == "fp8" or ".mlp." not in name}
    assert found.fp8 == (in_fp8 if kind in ("fp8", "modelopt-mixed", "compressed-tensors-mixed") else set())
    errors = [error for name, error in found.error.items() if name not in found.fp8]
    assert all(0.08 < error < 0.12 for error in errors)
    assert all(0.024 < found.error[name] < 0.029 for name in found.fp8)
    assert found.num_equal == len(source) - len(found.error)
    assert list(apply(RULES, found)) == []


def _double(e: Edit, suffix: str) -> None:
    e.tensors[f"{OUT_PROJ}.{suffix}"] = 2 * e.tensors[f"{OUT_PROJ}.{suffix}"]


def _shift_zero_points(e: Edit) -> None:
    e.quantization["sym"] = False
    name = f"{OUT_PROJ}.qzeros"
    e.tensors[name] = torch.full_like(e.tensors[name], 0x66666666)


def _first_scale(e: Edit, suffix: str, value: float) -> None:
    e.tensors[f"{OUT_PROJ}.{suffix}"][0, 0] = value


def _as_zero_points(e: Edit) -> None:
    """Asymmetric codes whose zero points are the symmetric ones."""
    e.quantization["config_groups"]["group_0"]["weights"]["symmetric"] = False
    for name in [n for n in e.tensors if n.endswith(".weight_scale")]:
        n, groups = e.tensors[name].shape
        e.tensors[name.replace(".weight_scale", ".weight_zero_point")] = int4.zeros(n, groups, 8).t().contiguous()


@pytest.mark.parametrize(
    ("kind", "change", "rules"),
    [
        ("compressed-tensors", partial(_double, suffix="weight_global_scale"), {"error-large"}),
        ("compressed-tensors-int4", partial(_double, suffix="weight_scale"), {"error-large"}),
        ("compressed-tensors-int4", _as_zero_points, set()),
        ("auto-round", partial(_double, suffix="scales"), {"error-large"}),
        ("auto-round", _shift_zero_points, {"error-large"}),
        ("auto-round", partial(_first_scale, suffix="scales", value=0.0), {"blocks-empty"}),
        ("auto-round", partial(_first_scale, suffix="scales", value=float("inf")), {"blocks-broken"}),
        ("gptq", lambda e: e.tensors.update({f"{OUT_PROJ}.qweight": e.tensors[f"{OUT_PROJ}.qweight"][:-1].clone()}), {"base-lacks"}),
        ("gptq", lambda e: e.tensors.pop(f"{OUT_PROJ}.scales"), {"not-compared"}),
        ("auto-round", lambda e: e.quantization.update(bits=8), set()),
    ],
)
def test_a_difference_is_found_in_other_formats(
    kind: str, change: Callable[[Edit], object], rules: set[str], small_bf16: Path, small_formats: dict[str, Path], tmp_path: Path
) -> None:
    edit = Edit(Path(shutil.copytree(small_formats[kind], tmp_path / "changed")))
    change(edit)
    edit.save()
    found = compare(Subject(Checkpoint.open(edit.path)), Checkpoint.open(small_bf16), silent=True)
    assert {finding.id for finding in apply(RULES, found)} == rules


def test_a_large_matrix_is_read_in_pieces(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 2048, generator=generator).to(torch.bfloat16)
    scale_2 = nvfp4.global_scale(weight.abs().max())
    codes, scales = nvfp4.quantize(weight, scale_2)
    save_file({"w": weight, "codes": codes, "scales": scales, "scale_2": scale_2.reshape(())}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    tensors = Checkpoint.open(tmp_path).tensors
    error, broken = relative_error(tensors["codes"], tensors["scales"], tensors["scale_2"], tensors["w"])
    whole = (nvfp4.dequantize(codes, scales, scale_2).double() - weight.double()).norm() / weight.double().norm()
    assert error == pytest.approx(float(whole), rel=1e-5)
    assert broken == 0


def test_equal_bytes(small_bf16: Path, tmp_path: Path) -> None:
    other = write_small(tmp_path / "other")
    one, two = (Checkpoint.open(path).tensors for path in (small_bf16, other))
    name = f"{PREFIX}embed_tokens.weight"
    assert same_bytes(one[name], two[name])
    raw = bytearray((other / "model.safetensors").read_bytes())
    raw[two[name].offset + two[name].num_bytes - 1] ^= 1
    (other / "model.safetensors").write_bytes(raw)
    assert not same_bytes(one[name], two[name])


def _scale(edit: Edit, suffix: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    edit.tensors[f"{OUT_PROJ}.{suffix}"] = change(edit.tensors[f"{OUT_PROJ}.{suffix}"])


def _first_block(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(scales: torch.Tensor) -> torch.Tensor:
        changed = scales.float()
        changed[0, 0] = value
        return changed.to(torch.float8_e4m3fn)

    return change


def _flip(edit: Edit, name: str) -> None:
    edit.tensors[name] = -edit.tensors[name]


def _one_nan(edit: Edit, name: str) -> None:
    edit.tensors[name].view(-1)[0] = float("nan")


def _trained(edit: Edit, *more: str) -> None:
    """What training leaves of a kept matrix; `more` become noise."""
    generator = torch.Generator().manual_seed(1)
    name = f"{PREFIX}layers.0.linear_attn.in_proj_a.weight"
    edit.tensors[name] = (edit.tensors[name].float() + 0.002 * torch.randn(edit.tensors[name].shape, generator=generator)).to(
        torch.bfloat16
    )
    for other in more:
        edit.tensors[other] = (0.05 * torch.randn(edit.tensors[other].shape, generator=generator)).to(torch.bfloat16)


def _noise(edit: Edit) -> None:
    kept = [name for name, tensor in edit.tensors.items() if tensor.dtype == torch.bfloat16 and tensor.ndim > 1]
    _trained(edit, *kept)


def _swap_tokens(edit: Edit) -> None:
    content = edit.read("tokenizer.json")
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    edit.write("tokenizer.json", content)


def _swap_rows(edit: Edit) -> None:
    ids = [edit.read("tokenizer.json")["model"]["vocab"][token] for token in "ab"]
    for name in (f"{PREFIX}embed_tokens.weight", "lm_head.weight"):
        edit.tensors[name][ids] = edit.tensors[name][ids[::-1]].clone()


BREAKS: dict[str, tuple[set[str], Callable[[Edit], object]]] = {
    "a norm negated": ({"kept-differs"}, lambda e: _flip(e, f"{PREFIX}norm.weight")),
    "the draft head trained": ({"mtp-differs"}, lambda e: _flip(e, "mtp.fc.weight")),
    "a tensor of its own": ({"base-lacks"}, lambda e: e.tensors.update({"extra.weight": torch.ones(2)})),
    "a global scale doubled": ({"error-large"}, lambda e: _scale(e, "weight_scale_2", lambda s: 2 * s)),
    "a global scale 10 % off": ({"error-outlier"}, lambda e: _scale(e, "weight_scale_2", lambda s: 1.1 * s)),
    "a NaN block": ({"blocks-broken"}, lambda e: _scale(e, "weight_scale", _first_block(float("nan")))),
    "an empty block": ({"blocks-empty", "error-outlier"}, lambda e: _scale(e, "weight_scale", _first_block(0.0))),
    "an output channel zeroed": ({"channels-lost", "error-outlier"}, lambda e: e.tensors[f"{OUT_PROJ}.weight"][7].zero_()),
    "a scale missing": ({"not-compared"}, lambda e: e.tensors.pop(f"{OUT_PROJ}.weight_scale")),
    "a NaN in a norm": ({"not-finite"}, lambda e: _one_nan(e, f"{PREFIX}norm.weight")),
    "a matrix trained": ({"base-ancestor"}, _trained),
    "a matrix trained, another of noise": ({"base-ancestor", "kept-unrelated"}, lambda e: _trained(e, "lm_head.weight")),
    "two tokens with each other's ids": ({"base-ancestor", "tokens-moved"}, lambda e: (_trained(e), _swap_tokens(e))),
    "tokens with their rows": ({"base-ancestor"}, lambda e: (_trained(e), _swap_tokens(e), _swap_rows(e))),
    "rows of zeros": ({"base-ancestor", "rows-zeroed"}, lambda e: e.tensors[f"{PREFIX}embed_tokens.weight"][100:105].zero_()),
    "another model": ({"base-stranger"}, _noise),
}


@pytest.mark.parametrize("case", list(BREAKS))
def test_a_difference_is_found(case: str, small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    edit = Edit(Path(shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "made")))
    expected, break_it = BREAKS[case]
    break_it(edit)
    edit.save()
    found = compare(Subject(Checkpoint.open(edit.path)), Checkpoint.open(small_bf16), silent=True)
    assert {finding.id for finding in apply(RULES, found)} == expected
    if "error-large" in expected or "error-outlier" in expected:
        finding = next(f for f in apply(RULES, found) if f.id.startswith("error-"))
        assert finding.where == (OUT_PROJ,)


def test_every_rule_on_the_comparison_has_a_case() -> None:
    assert {rule.id for rule in RULES} == set().union(*(expected for expected, _ in BREAKS.values()))


def test_a_base_of_another_width(small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    other = Edit(Path(shutil.copytree(small_bf16, tmp_path / "other")))
    other.tensors[f"{OUT_PROJ}.weight"] = torch.zeros(64, 32, dtype=torch.bfloat16)
    other.save()
    found = compare(Subject(Checkpoint.open(small_nvfp4["nvfp4-mtp-vlm"])), Checkpoint.open(other.path), silent=True)
    assert found.absent == [f"{OUT_PROJ}.weight"]
