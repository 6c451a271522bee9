"""convert of checkpoints whose linears are NVFP4, W4A16 and FP8: both ways and back, and what the other layout cannot say."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import PREFIX, Edit, in_fp8, quantizable
from format_breaks import MTP_LAYER
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.formats import compressed_tensors, mixed_precision, nvfp4
from mtpress.quant_config import conversion_kinds
from mtpress.quant_config.view import Subject
from mtpress.stages.check import check
from mtpress.stages.convert import convert

CT, MODELOPT = "compressed-tensors", "modelopt"
ATTENTION, Z = f"{PREFIX}layers.3.self_attn.", f"{PREFIX}layers.0.linear_attn.in_proj_z"
DECLARATIONS = ("config.json", "hf_quant_config.json")
OF_NVFP4 = ("weight_scale_2", "weight_global_scale", "input_global_scale")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    assert not checkpoint.unindexed
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def config(path: Path, name: str = "config.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / name).read_text())
    return content


def edited(source: Path, out: Path, change: Callable[[Edit], object]) -> Path:
    edit = Edit(Path(shutil.copytree(source, out)))
    change(edit)
    edit.save()
    return out


def errors(path: Path) -> list[str]:
    return [finding.id for finding in check(path, silent=True).findings if finding.severity == "error"]


def without_order(content: dict[str, Any]) -> dict[str, Any]:
    """A declaration of modelopt's with its groups as a set, and 16-bit modules in order of name."""
    said = content.get("quantization_config") or content["quantization"]
    if "config_groups" in said:
        said["config_groups"] = sorted(json.dumps(group, sort_keys=True) for group in said["config_groups"].values())
    for key in {"ignore", "exclude_modules"} & said.keys():
        said[key] = sorted(said[key])
    return content


def powers_of_two(e: Edit) -> None:
    """Global scales whose reciprocals are exact, so that nothing may differ after a round trip."""
    for name, tensor in e.tensors.items():
        if name.endswith(OF_NVFP4) or (name.endswith(".input_scale") and name.replace("input_scale", "weight_scale_2") in e.tensors):
            e.tensors[name] = torch.exp2(tensor.log2().round())


def everything_of_modelopt(e: Edit) -> None:
    """W4A16, FP8 by row in the draft layer and in lm_head and an FP8 KV cache beside the NVFP4 and the static FP8 that are there."""
    layers = e.quantization["quantized_layers"]
    formats = {m: next(kind for kind, algo in mixed_precision.ALGOS.items() if algo == entry["quant_algo"]) for m, entry in layers.items()}
    for module in [module for module in formats if "layers.2.mlp." in module]:
        formats[module] = "nvfp4_w4a16"
        del e.tensors[f"{module}.input_scale"]
    head = ["lm_head", *MTP_LAYER]
    in_fp8(e, *head)
    for module in head:
        e.tensors[f"{module}.weight_scale"] = e.tensors[f"{module}.weight_scale"].float().reshape(-1)
    for x in "kv":
        e.tensors[f"{ATTENTION}{x}_proj.{x}_scale"] = torch.tensor(0.5)
        e.tensors[f"mtp.layers.0.self_attn.{x}_proj.{x}_scale"] = torch.tensor(0.25)
    formats = {"lm_head": "fp8_by_row"} | formats | dict.fromkeys(sorted(MTP_LAYER), "fp8_by_row")
    kept = [module for module in e.quantization["ignore"] if module not in head]
    e.config["quantization_config"] = mixed_precision.quantization_config(nvfp4.quantization_config(kept, True), formats)
    e.hf = mixed_precision.hf_quant_config(nvfp4.hf_quant_config(kept, True), formats)
    powers_of_two(e)


@pytest.mark.parametrize(("change", "kinds"), [
    (powers_of_two, {"fp8": 13, "nvfp4": 12}),
    (everything_of_modelopt, {"fp8_by_row": 1 + len(MTP_LAYER), "fp8": 13, "nvfp4": 9, "nvfp4_w4a16": 3}),
], ids=["as_quantize_writes_it", "every_kind"])  # fmt: skip
def test_modelopt_there_and_back(
    small_formats: dict[str, Path], tmp_path: Path, change: Callable[[Edit], object], kinds: dict[str, int]
) -> None:
    source = edited(small_formats["modelopt-mixed"], tmp_path / "source", change)
    there = convert(source, tmp_path / "ct", CT, silent=True)
    assert there.kinds == kinds and there.num_converted == sum(kinds.values())
    assert errors(source) == errors(tmp_path / "ct") == []
    assert not (tmp_path / "ct/hf_quant_config.json").exists()
    assert config(tmp_path / "ct")["quantization_config"]["format"] == "mixed-precision"
    said, means = (Subject(Checkpoint.open(path)).schemes for path in (source, tmp_path / "ct"))
    assert said == means
    old, new = tensors(source), tensors(tmp_path / "ct")
    for module in (
        name.removesuffix(".weight") for name, tensor in old.items() if tensor.dtype == torch.float8_e4m3fn and "scale" not in name
    ):
        assert same_bytes(old[f"{module}.weight"], new[f"{module}.weight"])
        assert same_bytes(old[f"{module}.weight_scale"].view(-1), new[f"{module}.weight_scale"].view(-1))
    convert(tmp_path / "ct", tmp_path / "back", MODELOPT, silent=True)
    back = tensors(tmp_path / "back")
    assert back.keys() == old.keys() and all(same_bytes(old[name], back[name]) for name in old)
    for name in DECLARATIONS:
        assert without_order(config(tmp_path / "back", name)) == without_order(config(source, name))


def everything_of_compressed_tensors(e: Edit) -> None:
    """A W4A16 group, and lm_head and the draft layer in FP8 by row, beside what is there."""
    groups = e.quantization["config_groups"]
    whole, rows = groups["group_0"]["targets"], groups["group_1"]["targets"]
    weights_only = [module for module in whole if "layers.2.mlp." in module]
    whole[:] = [module for module in whole if module not in weights_only]
    for module in weights_only:
        del e.tensors[f"{module}.input_global_scale"]
    groups["group_2"] = compressed_tensors.nvfp4_group(weights_only, weight_only=True)
    in_fp8(e, "lm_head", *MTP_LAYER)
    rows += [compressed_tensors.LM_HEAD_TARGET, *MTP_LAYER]
    e.ignore([entry for entry in e.quantization["ignore"] if entry not in ("lm_head", *MTP_LAYER)])
    powers_of_two(e)


@pytest.mark.parametrize("change", [powers_of_two, everything_of_compressed_tensors])
def test_compressed_tensors_there_and_back(small_formats: dict[str, Path], tmp_path: Path, change: Callable[[Edit], object]) -> None:
    """Row scales in BF16 become float32, which modelopt has them in, and stay so: the numbers are the same."""
    source = edited(small_formats["compressed-tensors-mixed"], tmp_path / "source", change)
    convert(source, tmp_path / "modelopt", MODELOPT, silent=True)
    assert errors(source) == errors(tmp_path / "modelopt") == []
    said, means = (Subject(Checkpoint.open(path)).schemes for path in (source, tmp_path / "modelopt"))
    assert said == means
    old, new = tensors(source), tensors(tmp_path / "modelopt")
    assert same_bytes(new[f"{Z}.weight_scale"], old[f"{Z}.weight_scale"].float().view(-1))
    beside = config(tmp_path / "modelopt", "hf_quant_config.json")["quantization"]
    assert beside["quantized_layers"] == config(tmp_path / "modelopt")["quantization_config"]["quantized_layers"]
    assert beside["quantized_layers"][Z] == {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    convert(tmp_path / "modelopt", tmp_path / "back", CT, silent=True)
    back = tensors(tmp_path / "back")
    assert back.keys() == old.keys()
    for name, tensor in old.items():
        widened = name.endswith(".weight_scale") and tensor.dtype == torch.bfloat16
        assert same_bytes(tensor.float() if widened else tensor, back[name]), name
    convert(tmp_path / "back", tmp_path / "again", MODELOPT, silent=True)
    again = tensors(tmp_path / "again")
    assert all(same_bytes(tensor, again[name]) for name, tensor in new.items())


def fp8_throughout(path: Path, e: Edit, layout: str, kind: str) -> None:
    """All linears in FP8, codes and scales at random."""
    generator = torch.Generator().manual_seed(0)
    shapes = Subject(Checkpoint.open(path)).called_for
    for module in (modules := quantizable(dict.fromkeys(shapes, torch.empty(0)))):
        for name in [name for name in e.tensors if name.startswith(f"{module}.")]:
            del e.tensors[name]
        n, k = shapes[f"{module}.weight"]
        e.tensors[f"{module}.weight"] = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
        shape = {"fp8": (), "fp8_by_row": (n,), "fp8_in_blocks": (-(-n // 128), 1, -(-k // 128), 1)}[kind]
        e.tensors[f"{module}.weight_scale"] = torch.rand(shape, generator=generator)
        if kind == "fp8":
            e.tensors[f"{module}.input_scale"] = torch.tensor(0.1)
        if layout == CT:
            e.tensors[f"{module}.weight_scale"] = e.tensors[f"{module}.weight_scale"].squeeze(1).squeeze(-1)
    ignore, formats = e.quantization["ignore"], dict.fromkeys(modules, kind)
    if layout == CT:
        group = compressed_tensors.fp8_group(["Linear"], "block", block=(128, 128))
        e.config["quantization_config"] = compressed_tensors.grouped_config([group], ignore)
    else:
        e.config["quantization_config"] = mixed_precision.quantization_config(nvfp4.quantization_config(ignore, False), formats)
        e.hf = mixed_precision.hf_quant_config(nvfp4.hf_quant_config(ignore, False), formats)


@pytest.mark.parametrize("kind", ["fp8", "fp8_by_row"])
def test_fp8_throughout(small_formats: dict[str, Path], tmp_path: Path, kind: str) -> None:
    path = small_formats["modelopt-mixed"]
    source = edited(path, tmp_path / "source", lambda e: fp8_throughout(path, e, MODELOPT, kind))
    result = convert(source, tmp_path / "ct", CT, silent=True)
    assert errors(source) == errors(tmp_path / "ct") == [] and result.reciprocals["count"] == 0
    group = config(tmp_path / "ct")["quantization_config"]["config_groups"]["group_0"]
    assert (group["format"], group["targets"]) == ("float-quantized", ["Linear"])
    convert(tmp_path / "ct", tmp_path / "back", MODELOPT, silent=True)
    old, back = tensors(source), tensors(tmp_path / "back")
    assert back.keys() == old.keys() and all(same_bytes(old[name], back[name]) for name in old)
    assert [config(tmp_path / "back", name) for name in DECLARATIONS] == [config(source, name) for name in DECLARATIONS]


def test_blocks_go_over_in_the_shape_of_each_layout_where_128_divides_the_columns(small_formats: dict[str, Path], tmp_path: Path) -> None:
    for to, shape in ((MODELOPT, (3, 1, 2, 1)), (CT, (3, 2))):
        assert conversion_kinds.fp8_scale_shape("fp8_in_blocks", to, 300, 256) == shape
    path = small_formats["compressed-tensors-mixed"]
    source = edited(path, tmp_path / "source", lambda e: fp8_throughout(path, e, CT, "fp8_in_blocks"))
    with pytest.raises(
        InputError, match=r"and 20 more are FP8 in blocks that do not divide its 64 columns, for which modelopt has no algorithm"
    ):
        convert(source, tmp_path / "out", MODELOPT, silent=True)


def fp8_group(e: Edit) -> dict[str, Any]:
    group: dict[str, Any] = e.quantization["config_groups"]["group_1"]
    return group


def dynamic_tensor(e: Edit) -> None:
    fp8_group(e)["weights"]["strategy"] = "tensor"
    for module in fp8_group(e)["targets"]:
        e.tensors[f"{module}.weight_scale"] = torch.ones(1)


def static_rows(e: Edit) -> None:
    fp8_group(e)["input_activations"] = compressed_tensors.fp8_group([], "tensor", static=True)["input_activations"]
    for module in fp8_group(e)["targets"]:
        e.tensors[f"{module}.input_scale"] = torch.ones(1)


REFUSED: list[tuple[str, Callable[[Edit], object]]] = [
    (r"in_proj_qkv and 12 more are FP8 with activations in 16 bits", lambda e: fp8_group(e).update(input_activations=None)),
    (r"in_proj_qkv and 12 more are FP8 with one scale a tensor and none stored for activations", dynamic_tensor),
    (r"in_proj_qkv and 12 more are FP8 with one scale a row and a stored one for activations", static_rows),
    (r"in_proj_z\.input_scale is no part of compressed-tensors FP8", lambda e: e.tensors.update({f"{Z}.input_scale": torch.ones(1)})),
    (r"in_proj_z is FP8 without a scale of a tensor, row or block", lambda e: e.tensors.pop(f"{Z}.weight_scale")),
    (r"in_proj_qkv is declared in another format than it is stored in", lambda e: fp8_group(e)["weights"].update(strategy="tensor")),
    (r"weights in group_1 that are neither NVFP4 nor FP8", lambda e: fp8_group(e)["weights"].update(num_bits=6)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "change"), REFUSED, ids=[said[:40] for said, _ in REFUSED])
def test_what_modelopt_cannot_say_is_refused_in_one_line(
    small_formats: dict[str, Path], tmp_path: Path, said: str, change: Callable[[Edit], object]
) -> None:
    source = edited(small_formats["compressed-tensors-mixed"], tmp_path / "source", change)
    with pytest.raises(InputError, match=said) as refused:
        convert(source, tmp_path / "out", MODELOPT, silent=True)
    assert "\n" not in str(refused.value) and not list(tmp_path.glob("out*"))


def test_two_formats_in_a_fused_linear_are_refused(small_formats: dict[str, Path], tmp_path: Path) -> None:
    def by_row(e: Edit) -> None:
        assert e.hf is not None
        e.tensors[f"{Z}.weight_scale"] = torch.ones(len(e.tensors[f"{Z}.weight"]))
        del e.tensors[f"{Z}.input_scale"]
        for said in (e.quantization, e.hf["quantization"]):
            said["quantized_layers"][Z]["quant_algo"] = mixed_precision.ALGOS["fp8_by_row"]

    source = edited(small_formats["modelopt-mixed"], tmp_path / "source", by_row)
    with pytest.raises(
        InputError, match=r"in_proj_z is FP8 by row and .*in_proj_qkv FP8; no engine loads two formats in one linear_attn.in_proj_qkvz"
    ):
        convert(source, tmp_path / "out", CT, silent=True)
