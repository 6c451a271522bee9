"""What is refused before weights are read, and modules as they are stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checkpoints import PREFIX, Edit, pack_int4
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.evaluation.bodies import Body, FP8Cache, open_bodies
from mtpress.formats import nvfp4
from mtpress.formats.fp8 import to_e4m3
from mtpress.models.qwen3_5.layers import StreamedBody
from mtpress.quant_config.emulation import EMULATIONS, EmulatedLinear
from mtpress.rounding.max import round_group

CPU = torch.device("cpu")
ATTENTION = f"{PREFIX}layers.3.self_attn"


def without(name: str) -> Callable[[Edit], object]:
    return lambda e: e.tensors.pop(name)


def other_width(e: Edit) -> None:
    e.text["intermediate_size"] = 128
    for i in range(4):
        for part, shape in (("gate_proj", (128, 64)), ("up_proj", (128, 64)), ("down_proj", (64, 128))):
            e.tensors[f"{PREFIX}layers.{i}.mlp.{part}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)
    for part, shape in (("gate_proj", (128, 64)), ("up_proj", (128, 64)), ("down_proj", (64, 128))):
        e.tensors[f"mtp.layers.0.mlp.{part}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)


def other_token(e: Edit) -> None:
    tokenizer = e.read("tokenizer.json")
    tokenizer["added_tokens"][0]["content"] = "<|other|>"
    e.write("tokenizer.json", tokenizer)


def in_blocks(e: Edit) -> None:
    name = f"{PREFIX}layers.0.mlp.up_proj"
    e.tensors[f"{name}.weight"] = e.tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    e.tensors[f"{name}.weight_scale_inv"] = torch.ones(2, 2)


REFUSED: dict[str, tuple[Callable[[Edit], object], str]] = {
    "a missing norm": (without(f"{PREFIX}norm.weight"), "norm.weight is missing"),
    "a missing matrix": (without(f"{PREFIX}layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
    "other sizes": (other_width, "another model than the base"),
    "another tokenizer": (other_token, "its tokenizer is not the base's"),
    "FP8 in other blocks": (in_blocks, r"weight_scale_inv \[2, 2\] is not of blocks of 128×128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_one_line(case: str, small_bf16: Path, tmp_path: Path) -> None:
    break_it, said = REFUSED[case]
    made = Path(shutil.copytree(small_bf16, tmp_path / "made"))
    e = Edit(made)
    break_it(e)
    e.save()
    with pytest.raises(InputError, match=said) as caught:
        open_bodies(small_bf16, [made])
    assert str(made) in str(caught.value)


def test_scales_that_are_missing_or_misshapen_are_refused(small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    name = f"{PREFIX}layers.0.mlp.up_proj"
    for number, (suffix, said) in enumerate(
        {"input_scale": "is missing", "weight_scale_2": "is missing", "weight_scale": "scales"}.items()
    ):
        made = Path(shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / str(number)))
        e = Edit(made)
        tensor = e.tensors.pop(f"{name}.{suffix}")
        if suffix == "weight_scale":
            e.tensors[f"{name}.{suffix}"] = tensor[:, :2].contiguous()
        e.save()
        with pytest.raises(InputError, match=said):
            open_bodies(small_bf16, [made])


def test_the_base_must_be_bf16_and_each_checkpoint_named_once(small_bf16: Path, small_nvfp4: dict[str, Path]) -> None:
    made = small_nvfp4["nvfp4-mtp-vlm"]
    with pytest.raises(InputError, match="must be in BF16"):
        open_bodies(made, [made])
    with pytest.raises(InputError, match="named twice"):
        open_bodies(small_bf16, [made, made])


def test_equal_directory_names_are_told_apart(small_bf16: Path, tmp_path: Path) -> None:
    paths = [Path(shutil.copytree(small_bf16, tmp_path / side / "out")) for side in ("one", "two")]
    _, others = open_bodies(small_bf16, paths)
    assert [body.name for body in others] == ["one/out", "two/out"]


@pytest.mark.parametrize("kind", ["compressed-tensors", "compressed-tensors-w4a16", "compressed-tensors-int4", "auto-round", "gptq"])
def test_every_format_is_taken_as_its_config_says(kind: str, small_formats: dict[str, Path], small_bf16: Path) -> None:
    _, (body,) = open_bodies(small_bf16, [small_formats[kind]])
    layer = body.layer(StreamedBody(body.checkpoint.config, CPU), 0, {i.name: body.checkpoint.read(i.name) for i in body.layer_infos(0)})
    linear = layer.get_submodule("mlp.up_proj")
    assert isinstance(linear, EmulatedLinear)
    assert (linear.rounding is not None) == (kind == "compressed-tensors")
    source = Checkpoint.open(small_bf16).read(f"{PREFIX}layers.0.mlp.up_proj.weight").float()
    assert 0 < float((linear.matrix.float() - source).norm() / source.norm()) < 0.15
    assert isinstance(layer.get_submodule("linear_attn.in_proj_a"), torch.nn.Linear)


def test_a_layer_s_fused_linears_share_their_scales(small_bf16: Path, small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    made = Path(shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "made"))
    e = Edit(made)
    e.tensors[f"{ATTENTION}.k_proj.weight_scale_2"] *= 4
    e.save()
    _, (body,) = open_bodies(small_bf16, [made])
    layer = body.layer(StreamedBody(body.checkpoint.config, CPU), 3, {i.name: body.checkpoint.read(i.name) for i in body.layer_infos(3)})
    stored = {s: body.checkpoint.read(f"{ATTENTION}.q_proj.{s}") for s in (nvfp4.WEIGHT, nvfp4.SCALE)}
    shared = body.checkpoint.read(f"{ATTENTION}.k_proj.weight_scale_2")
    expected = nvfp4.dequantize(stored[nvfp4.WEIGHT], stored[nvfp4.SCALE], shared).to(torch.bfloat16)
    assert torch.equal(layer.get_submodule("self_attn.q_proj").matrix, expected)  # type: ignore[arg-type]


def quantize_lm_head(e: Edit, form: str) -> None:
    if form == "gptq":
        pack_int4(e, "lm_head")
    elif form == "nvfp4":
        parts = round_group({"w": e.tensors.pop("lm_head.weight")})["w"] | {nvfp4.INPUT_SCALE: torch.tensor(0.01)}
        e.tensors |= {f"lm_head.{suffix}": tensor for suffix, tensor in parts.items()}
    elif form == "fp8":
        scale = e.tensors["lm_head.weight"].float().abs().amax(1, keepdim=True) / 448
        e.tensors |= {"lm_head.weight": to_e4m3(e.tensors["lm_head.weight"], scale), "lm_head.weight_scale": scale}


@pytest.mark.parametrize("form", ["plain", "nvfp4", "gptq", "fp8"])
def test_pieces_of_lm_head_are_the_whole(form: str, small_bf16: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(small_bf16, tmp_path / "made"))
    e = Edit(made)
    quantize_lm_head(e, form)
    e.save()
    body = Body(Checkpoint.open(made), "made")
    assert body.subject.form("lm_head") == form
    parts = {suffix: body.checkpoint.read(info.name) for suffix, info in body.subject.modules["lm_head"].items()}
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    if form == "plain":
        expected = x @ parts["weight"].t()
    else:
        expected = EMULATIONS[body.subject.form("lm_head")].make(parts, [parts], True, torch.bfloat16)(x)
    pieces = [body.lm_head_piece(start, stop, CPU)(x) for start, stop in ((0, 128), (128, 256), (256, 288))]
    assert [piece.shape[1] for piece in pieces] == [128, 128, 32]
    assert torch.equal(torch.cat(pieces, 1), expected)


def test_keys_and_values_are_rounded_under_their_scales() -> None:
    keys, values = (torch.randn(1, 2, 7, 32, generator=torch.Generator().manual_seed(s)).to(torch.bfloat16) for s in (1, 2))
    for (got, scale), given in zip(
        zip(FP8Cache(None, 0.5, 0.25).update(keys, values, 0), (0.5, 0.25), strict=True), (keys, values), strict=True
    ):
        assert torch.equal(got, ((given.double() / scale).float().to(torch.float8_e4m3fn).double() * scale).to(torch.bfloat16))
        assert not torch.equal(got, given)


def test_the_cache_is_fp8_where_the_checkpoint_declares_it(small_nvfp4: dict[str, Path]) -> None:
    for recipe, declared in (("nvfp4-kvfp8-vlm", True), ("nvfp4-mtp-vlm", False)):
        checkpoint = Checkpoint.open(small_nvfp4[recipe])
        assert [Body(checkpoint, "x", asked).kv_cache_fp8 for asked in ("auto", "fp8", "bf16")] == [declared, True, False]


def test_stored_kv_scales_are_read(small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    made = Path(shutil.copytree(small_nvfp4["nvfp4-kvfp8-vlm"], tmp_path / "made"))
    e = Edit(made)
    e.tensors |= {f"{ATTENTION}.k_proj.k_scale": torch.tensor(0.5), f"{ATTENTION}.v_scale": torch.tensor(0.25)}
    e.save()
    body = Body(Checkpoint.open(made), "x")
    assert [body._kv_scale(ATTENTION, kind) for kind in "kv"] == [0.5, 0.25]
    assert body._kv_scale("mtp.layers.0.self_attn", "k") == 1.0
    assert json.loads((made / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
