"""convert: both ways and back, byte for byte; unequal global scales; text only; what is refused, and what a stopped run leaves."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import PREFIX, Edit
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.plan.recipe import load_recipe
from mtpress.quant_config import conversion_kinds
from mtpress.stages import convert as stage
from mtpress.stages.convert import ConvertResult, convert
from mtpress.stages.quantize import quantize

TINY = Path(__file__).parents[2] / "src/mtpress/builtin/mtpress-tiny"
Q, Z, QKV = (f"{PREFIX}layers.{name}" for name in ("3.self_attn.q_proj", "0.linear_attn.in_proj_z", "0.linear_attn.in_proj_qkv"))
CT, MODELOPT = "compressed-tensors", "modelopt"


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor that the index names."""
    checkpoint = Checkpoint.open(path)
    assert not checkpoint.unindexed
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def weights(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 weight of every NVFP4 linear of either layout, by this package's own dequantization."""
    found = {}
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and tensor.dtype == torch.uint8:
            found[module] = nvfp4.dequantize(tensor, stored[f"{module}.weight_scale"], stored[f"{module}.weight_scale_2"])
        if suffix == "weight_packed":
            scale_2 = 1 / stored[f"{module}.weight_global_scale"]
            found[module] = nvfp4.dequantize(tensor, stored[f"{module}.weight_scale"], scale_2)
    return found


def config(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mtpress-tiny in NVFP4, weight-only calibrated: one input scale for all."""
    out = tmp_path_factory.mktemp("tiny") / "nvfp4"
    quantize(TINY, out, load_recipe("nvfp4-mtp-vlm").model_copy(update={"constant_input_scale": 0.0037}), silent=True)
    return out


@pytest.fixture(scope="module")
def converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConvertResult]:
    out = tmp_path_factory.mktemp("tiny") / "ct"
    before = files(tiny)
    result = convert(tiny, out, CT, silent=True)
    assert files(tiny) == before
    return out, result


@pytest.fixture
def small(small_nvfp4: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the small NVFP4 checkpoint, to break."""
    return Path(shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "small"))


def test_the_choices_are_the_layouts() -> None:
    assert stage.CHOICES == conversion_kinds.LAYOUTS


def test_codes_and_block_scales_keep_their_bytes(tiny: Path, converted: tuple[Path, ConvertResult]) -> None:
    old, new = tensors(tiny), tensors(converted[0])
    linears = [name.removesuffix(".weight_scale_2") for name in old if name.endswith(".weight_scale_2")]
    assert len(linears) == converted[1].num_converted > 20
    for module in linears:
        assert same_bytes(old.pop(f"{module}.weight"), new.pop(f"{module}.weight_packed"))
        assert same_bytes(old.pop(f"{module}.weight_scale"), new.pop(f"{module}.weight_scale"))
        for ours, theirs in (("weight_scale_2", "weight_global_scale"), ("input_scale", "input_global_scale")):
            divisor = new.pop(f"{module}.{theirs}")
            assert divisor.shape == (1,) and same_bytes(divisor, (1 / old.pop(f"{module}.{ours}").double()).float().view(1))
    assert old.keys() == new.keys() and all(same_bytes(old[name], new[name]) for name in old)


def test_one_file_stays_one(tiny: Path, converted: tuple[Path, ConvertResult]) -> None:
    """transformers reads model.safetensors alone where there is one."""
    for path in (tiny, converted[0]):
        assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"]
    names = [[info.name for info in Checkpoint.open(path).shards[0].tensors] for path in (tiny, converted[0])]
    modules = [[name.rpartition(".")[0] for name in stored] for stored in names]
    assert modules[0] == modules[1]


def test_what_the_config_says(tiny: Path, converted: tuple[Path, ConvertResult]) -> None:
    out, result = converted
    said = config(out)["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "nvfp4-pack-quantized"
    assert said["ignore"] == list(result.ignore) == config(tiny)["quantization_config"]["ignore"]
    assert not (out / "hf_quant_config.json").exists()
    assert {k: v for k, v in config(out).items() if k != "quantization_config"} == {
        k: v for k, v in config(tiny).items() if k != "quantization_config"
    }
    other = {name: content for name, content in files(tiny).items() if name not in ("config.json", "hf_quant_config.json", "mtpress.json")}
    assert all((out / name).read_bytes() == content for name, content in other.items() if "safetensors" not in name)


def test_a_round_trip_differs_where_float32_must(tiny: Path, converted: tuple[Path, ConvertResult], tmp_path: Path) -> None:
    out, result = converted
    convert(out, tmp_path / "back", MODELOPT, silent=True)
    old, new = tensors(tiny), tensors(tmp_path / "back")
    assert old.keys() == new.keys()
    different = [name for name in old if not same_bytes(old[name], new[name])]
    count, exact = result.reciprocals["count"], result.reciprocals["exact"]
    assert count == 2 * result.num_converted and len(different) == count - exact > 0
    for name in different:
        assert name.endswith((".weight_scale_2", ".input_scale"))
        assert abs(int(old[name].view(torch.int32)) - int(new[name].view(torch.int32))) == 1
        assert abs(new[name].item() / old[name].item() - 1) <= result.reciprocals["largest_relative_difference"] < 2**-23
    assert config(tmp_path / "back") == config(tiny)
    assert (tmp_path / "back/hf_quant_config.json").read_bytes() == (tiny / "hf_quant_config.json").read_bytes()
    again = convert(tmp_path / "back", tmp_path / "again", CT, silent=True)
    assert again.reciprocals["exact"] == count
    assert files(tmp_path / "again").keys() == files(out).keys()
    ct, ct_again = tensors(out), tensors(tmp_path / "again")
    assert all(same_bytes(ct[name], ct_again[name]) for name in ct)


def test_the_record(tiny: Path, converted: tuple[Path, ConvertResult]) -> None:
    record = json.loads((converted[0] / "mtpress.json").read_text())
    assert record["stage"] == "convert" and record["to"] == CT and record["reciprocals"] == converted[1].reciprocals
    assert record["source"]["identity"] == Checkpoint.open(tiny).identity
    assert json.loads(json.dumps(converted[1].as_json())) == json.loads(json.dumps(asdict(converted[1])))


def test_the_command_line(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(small), str(tmp_path / "ct"), "--to", CT, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["num_converted"] == 25 and shown["to"] == CT
    assert main(["convert", str(tmp_path / "ct"), str(tmp_path / "back"), "--to", MODELOPT]) == 0
    shown = capsys.readouterr().out
    assert "25 linears converted: codes and block scales byte for byte\n50 scales are reciprocals: converted back, to the last bit" in shown
    assert main(["convert", str(small), str(tmp_path / "ct"), "--to", CT]) == 2
    assert main(["convert", str(small), str(tmp_path / "x")]) == 2


def edited(path: Path, change: Callable[[Edit], object]) -> Path:
    edit = Edit(path)
    change(edit)
    edit.save()
    return path


def scale(edit: Edit, module: str, factor: float) -> None:
    name = f"{module}.weight_scale_2"
    edit.tensors[name] = edit.tensors[name] * factor


def halve_blocks(edit: Edit, module: str) -> None:
    name = f"{module}.weight_scale"
    edit.tensors[name] = (edit.tensors[name].double() / 2).clamp(min=2**-6).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("to", [CT, MODELOPT])
def test_unequal_scales_a_power_of_two_apart_cost_nothing(small: Path, tmp_path: Path, to: str) -> None:
    edited(small, lambda e: (halve_blocks(e, Z), scale(e, Z, 2.0)))
    source = small
    if to == MODELOPT:  # the layout that llm-compressor writes, with what it does not share
        source = unshare(convert(small, tmp_path / "ct", CT, silent=True), Z, 0.5, tmp_path / "ct")
    before = weights(tensors(source))
    result = convert(source, tmp_path / "out", to, silent=True)
    (found,) = result.rescaled
    assert found["linear"] == f"{PREFIX}layers.0.linear_attn.in_proj_qkvz" and found["exact"]
    after = tensors(tmp_path / "out")
    suffix = "weight_global_scale" if to == CT else "weight_scale_2"
    assert same_bytes(after[f"{Z}.{suffix}"], after[f"{QKV}.{suffix}"])
    assert all(torch.equal(before[module], weight) for module, weight in weights(after).items())


def unshare(result: ConvertResult, module: str, factor: float, path: Path) -> Path:
    """Halves block scales of a compressed-tensors linear that convert has made equal, and its divisor with them."""
    assert result.rescaled[0]["exact"]
    for file in path.glob("*.safetensors"):
        stored = load_file(file)
        for name in (f"{module}.weight_scale", f"{module}.weight_global_scale"):
            if name in stored:
                stored[name] = (stored[name].double() * factor).to(stored[name].dtype)
        save_file(stored, file, metadata={"format": "pt"})
    return path


def test_unequal_scales_that_block_scales_cannot_take_are_refused_or_paid_for(small: Path, tmp_path: Path) -> None:
    edited(small, lambda e: scale(e, Z, 1.37))
    with pytest.raises(InputError, match=r"1 fused linears .*in_proj_qkvz.* RMS\); --rescale accepts that") as refused:
        convert(small, tmp_path / "out", CT, silent=True)
    assert "\n" not in str(refused.value) and not list(tmp_path.glob("out*"))
    before = tensors(small)
    result = convert(small, tmp_path / "out", CT, rescale=True, silent=True)
    (found,) = result.rescaled
    assert not found["exact"] and found["scales_2"][Z] == pytest.approx(1.37 * found["scales_2"][QKV])
    after = tensors(tmp_path / "out")
    old, new = weights(before), weights(after)
    for module in old:
        error = ((new[module].double() - old[module]).norm() / old[module].double().norm()).item()
        assert error == pytest.approx(found["relative_errors"].get(module, 0), rel=1e-4, abs=1e-6)
        assert same_bytes(before[f"{module}.weight"], after[f"{module}.weight_packed"])
    assert 0.001 < max(found["relative_errors"].values()) < 0.05


def test_scales_one_rounding_apart_are_no_loss(small: Path, tmp_path: Path) -> None:
    name = f"{Z}.weight_scale_2"
    edited(small, lambda e: e.tensors.update({name: (e.tensors[name].view(torch.int32) + 1).view(torch.float32)}))
    (found,) = convert(small, tmp_path / "out", CT, silent=True).rescaled
    assert not found["exact"] and 0 < max(found["relative_errors"].values()) < 2**-22


def test_unequal_input_scales_are_carried_and_said(small: Path, tmp_path: Path) -> None:
    edited(small, lambda e: e.tensors.update({f"{Q}.input_scale": torch.tensor(0.25)}))
    result = convert(small, tmp_path / "out", CT, silent=True)
    assert result.unequal_input_scales == (f"{PREFIX}layers.3.self_attn.qkv_proj",)
    assert tensors(tmp_path / "out")[f"{Q}.input_global_scale"].item() == 4.0


def weight_only(edit: Edit) -> None:
    edit.quantization["quant_algo"] = "W4A16_NVFP4"
    edit.hf["quantization"]["quant_algo"] = "W4A16_NVFP4"  # type: ignore[index]
    del edit.quantization["config_groups"]["group_0"]["input_activations"]


@pytest.mark.parametrize("stray", [False, True])
def test_activations_in_16_bits(small: Path, tmp_path: Path, stray: bool) -> None:
    edited(small, weight_only)
    if not stray:
        edited(small, lambda e: [e.tensors.pop(name) for name in list(e.tensors) if name.endswith("input_scale")])
    result = convert(small, tmp_path / "ct", CT, silent=True)
    assert result.weight_only and result.reciprocals["count"] == result.num_converted
    assert config(tmp_path / "ct")["quantization_config"]["config_groups"]["group_0"]["input_activations"] is None
    assert not [name for name in tensors(tmp_path / "ct") if "input" in name.rpartition(".")[2]]
    convert(tmp_path / "ct", tmp_path / "back", MODELOPT, silent=True)
    assert config(tmp_path / "back") == config(small)
    assert json.loads((tmp_path / "back/hf_quant_config.json").read_text()) == json.loads((small / "hf_quant_config.json").read_text())


def test_a_kv_cache_in_fp8(small_nvfp4: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(small_nvfp4["nvfp4-kvfp8-vlm"], tmp_path / "kv"))
    attention = f"{PREFIX}layers.3.self_attn."
    edited(source, lambda e: e.tensors.update({f"{attention}{x}_proj.{x}_scale": torch.tensor(0.5) for x in "kv"}))
    convert(source, tmp_path / "ct", CT, silent=True)
    scheme = config(tmp_path / "ct")["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"], scheme["strategy"], scheme["dynamic"]) == (8, "float", "tensor", False)
    made = tensors(tmp_path / "ct")
    assert [made[f"{attention}{x}_scale"].tolist() for x in "kv"] == [[0.5], [0.5]]
    assert f"{attention}k_proj.k_scale" not in made
    convert(tmp_path / "ct", tmp_path / "back", MODELOPT, silent=True)
    assert config(tmp_path / "back") == config(source)
    assert same_bytes(tensors(tmp_path / "back")[f"{attention}v_proj.v_scale"], torch.tensor(0.5))


def test_a_quantized_lm_head_is_named_as_a_target(small: Path, tmp_path: Path) -> None:
    def quantize_it(edit: Edit) -> None:
        weight = edit.tensors.pop("lm_head.weight")
        edit.tensors["lm_head.weight_scale_2"] = nvfp4.global_scale(nvfp4.amax(weight))
        edit.tensors["lm_head.weight"], edit.tensors["lm_head.weight_scale"] = nvfp4.quantize(
            weight, edit.tensors["lm_head.weight_scale_2"]
        )
        edit.tensors["lm_head.input_scale"] = torch.tensor(0.01)
        edit.without(lambda entry: entry == "lm_head")

    edited(small, quantize_it)
    convert(small, tmp_path / "ct", CT, silent=True)
    said = config(tmp_path / "ct")["quantization_config"]
    assert "lm_head" not in said["ignore"] and said["config_groups"]["group_0"]["targets"] == ["Linear", r"re:.*lm_head$"]


def test_text_only_while_converting(small: Path, tmp_path: Path) -> None:
    result = convert(small, tmp_path / "out", CT, text_only=True, silent=True)
    made = tensors(tmp_path / "out")
    assert result.num_dropped == 21 and not [name for name in made if "visual" in name]
    assert config(tmp_path / "out")["language_model_only"] is True
    assert not [entry for entry in config(tmp_path / "out")["quantization_config"]["ignore"] if "visual" in entry]
    assert not list((tmp_path / "out").glob("*preprocessor_config.json")) and (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.parametrize("layout", [MODELOPT, CT])
def test_text_only_alone_touches_nothing_but_the_tower(small: Path, tmp_path: Path, layout: str) -> None:
    source = small
    if layout == CT:
        convert(small, source := tmp_path / "ct", CT, silent=True)
    split(source)
    before = files(source)
    result = convert(source, tmp_path / "out", text_only=True, silent=True)
    assert files(source) == before
    old, new = tensors(source), tensors(tmp_path / "out")
    assert new.keys() == {name for name in old if "visual" not in name} and all(same_bytes(old[name], new[name]) for name in new)
    assert result.num_dropped == 21 and result.to is None and result.linked and result.bytes_linked > 10_000
    for name in result.linked:
        assert (tmp_path / "out" / name).samefile(source / name)
    ignore = config(source)["quantization_config"]["ignore"]
    assert config(tmp_path / "out")["quantization_config"]["ignore"] == [entry for entry in ignore if "visual" not in entry]
    assert config(tmp_path / "out")["language_model_only"] is True
    assert (tmp_path / "out/hf_quant_config.json").exists() == (layout == MODELOPT)
    if layout == MODELOPT:
        said = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
        assert said["exclude_modules"] == config(tmp_path / "out")["quantization_config"]["ignore"]
    assert not list((tmp_path / "out").glob("*preprocessor_config.json"))
    with pytest.raises(InputError, match="has no vision tower to drop"):
        convert(tmp_path / "out", tmp_path / "again", text_only=True, silent=True)


def split(path: Path) -> None:
    """Moves the layers of a checkpoint into a shard of their own, which holds nothing of the tower."""
    stored = tensors(path)
    for file in path.glob("*.safetensors"):
        file.unlink()
    shards: dict[str, dict[str, torch.Tensor]] = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    first, second = shards.values()
    for name, tensor in stored.items():
        (second if ".layers." in name else first)[name] = tensor
    for file_name, content in shards.items():
        save_file(content, path / file_name, metadata={"format": "pt"})
    weight_map = {name: file_name for file_name, content in shards.items() for name in content}
    total = sum(tensor.nbytes for tensor in stored.values())
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def test_text_only_of_an_unquantized_checkpoint(small_bf16: Path, tmp_path: Path) -> None:
    convert(small_bf16, tmp_path / "out", text_only=True, silent=True)
    assert config(tmp_path / "out") == config(small_bf16) | {"language_model_only": True}
    assert not [name for name in tensors(tmp_path / "out") if "visual" in name]


def declared(**keys: Any) -> Callable[[Edit], object]:
    return lambda e: e.config.update(quantization_config=keys)


BROKEN: list[tuple[str, Callable[[Edit], object]]] = [
    (r"q_proj has no weight_scale_2; mtpress check", lambda e: e.tensors.pop(f"{Q}.weight_scale_2")),
    (r"q_proj has no input_scale; mtpress check", lambda e: e.tensors.pop(f"{Q}.input_scale")),
    (r"q_proj\.pre_quant_scale is no part of modelopt NVFP4", lambda e: e.tensors.update({f"{Q}.pre_quant_scale": torch.ones(64)})),
    (r"weight_scale is U8 .*, must be F8_E4M3", lambda e: e.tensors.update({f"{Q}.weight_scale": torch.ones(128, 4, dtype=torch.uint8)})),
    (r"weight_scale_2 is F32 \[2\], must be F32 \[\]", lambda e: e.tensors.update({f"{Q}.weight_scale_2": torch.ones(2)})),
    (r"weight_scale_2 is 0, a scale must be positive", lambda e: e.tensors.update({f"{Q}.weight_scale_2": torch.tensor(0.0)})),
    (r"weight_scale_2 is nan, a scale must be positive", lambda e: e.tensors.update({f"{Q}.weight_scale_2": torch.tensor(torch.nan)})),
    (r"input_scale is 1e-40, a scale must be positive", lambda e: e.tensors.update({f"{Q}.input_scale": torch.tensor(1e-40)})),
    (r"declares GPTQ, modelopt NVFP4 is stored", declared(quant_method="gptq", bits=4)),
    (r"declares modelopt mixed precision, modelopt NVFP4 is stored", declared(quant_method="modelopt", quant_algo="MIXED_PRECISION")),
    (r"declares a KV cache in nvfp4", lambda e: e.quantization.update(kv_cache_scheme={"num_bits": 4, "type": "float"})),
]  # fmt: skip


@pytest.mark.parametrize(("said", "break_it"), BROKEN, ids=[said[:24] for said, _ in BROKEN])
def test_broken_checkpoints_are_refused_in_one_line(small: Path, tmp_path: Path, said: str, break_it: Callable[[Edit], object]) -> None:
    edited(small, break_it)
    with pytest.raises(InputError, match=said) as refused:
        convert(small, tmp_path / "out", CT, silent=True)
    assert "\n" not in str(refused.value) and not list(tmp_path.glob("out*"))


def drop_scales(edit: Edit, module: str) -> None:
    n, half = edit.tensors[f"{module}.weight"].shape
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        edit.tensors.pop(f"{module}.{suffix}")
    edit.tensors[f"{module}.weight"] = torch.ones(n, 2 * half, dtype=torch.bfloat16)


def test_a_fused_linear_of_two_kinds_is_refused(small: Path, tmp_path: Path) -> None:
    edited(small, lambda e: drop_scales(e, Z))
    with pytest.raises(InputError, match=r"in_proj_z is not quantized and others of .*in_proj_qkvz are"):
        convert(small, tmp_path / "out", CT, silent=True)


def test_what_is_no_nvfp4_is_refused(small: Path, small_bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds nothing quantized; convert goes between modelopt and compressed-tensors, of NVFP4 and FP8"):
        convert(small_bf16, tmp_path / "out", CT, silent=True)
    with pytest.raises(InputError, match="is modelopt NVFP4 already"):
        convert(small, tmp_path / "out", MODELOPT, silent=True)

    def to_int4(edit: Edit) -> None:
        for name in [n for n in edit.tensors if n.endswith(".weight_scale_2")]:
            drop_scales(edit, module := name.removesuffix(".weight_scale_2"))
            edit.tensors[f"{module}.qweight"] = torch.zeros(8, 128, dtype=torch.int32)
            del edit.tensors[f"{module}.weight"]

    edited(small, to_int4)
    with pytest.raises(InputError, match=r"holds GPTQ/AutoRound INT4; convert goes between .*, without touching a code"):
        convert(small, tmp_path / "out", CT, silent=True)


def test_torn_shards_are_refused(small: Path, tmp_path: Path) -> None:
    shard = small / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert main(["convert", str(small), str(tmp_path / "out"), "--to", CT]) == 2
    assert not list(tmp_path.glob("out*"))
