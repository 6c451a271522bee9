"""quantize, end to end on the built-in model: every byte of the output is accounted for."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mtpress.builtin import BUILTIN_MODEL
from mtpress.calibration import load_calibration
from mtpress.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.formats import nvfp4
from mtpress.models.qwen3_5 import MTP_TENSORS
from mtpress.recipe import load_recipe, shipped
from mtpress.stages.quantize import quantize

FUSED = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
FUSED += [("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), ("linear_attn.in_proj_b", "linear_attn.in_proj_a")]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    return weights(BUILTIN_MODEL)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of every shipped recipe."""
    found = {}
    for name in shipped():
        found[name] = tmp_path_factory.mktemp("built") / name
        quantize(BUILTIN_MODEL, found[name], name, calibration=["builtin"], silent=True)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a.reshape(-1)), bits(b.reshape(-1)))


@pytest.mark.parametrize("recipe", list(shipped()))
def test_every_tensor_is_kept_quantized_or_dropped(recipe: str, built: dict[str, Path], source: dict[str, torch.Tensor]) -> None:
    made = weights(built[recipe])
    drops = load_recipe(recipe).vision == "drop"
    for name, tensor in source.items():
        if drops and name.startswith("model.visual."):
            assert name not in made
        elif f"{name}_scale" in made:
            packed, scales, scale_2 = made.pop(name), made.pop(f"{name}_scale"), made.pop(f"{name}_scale_2")
            assert made.pop(name.replace(".weight", ".input_scale")) > 0
            error = (nvfp4.dequantize(packed, scales, scale_2) - tensor.float()).norm() / tensor.float().norm()
            assert 0.02 < error < 0.13  # NVFP4 of anything near Gaussian is about 0.095
        else:
            assert same(made.pop(name), tensor), name
    assert not made


@pytest.mark.parametrize("recipe", list(shipped()))
def test_the_draft_head_is_whole_and_ignored(recipe: str, built: dict[str, Path], source: dict[str, torch.Tensor]) -> None:
    made = weights(built[recipe])
    config = json.loads((built[recipe] / "config.json").read_text())
    modelopt = json.loads((built[recipe] / "hf_quant_config.json").read_text())["quantization"]
    assert {n for n in made if n.startswith("mtp.")} == set(MTP_TENSORS)
    for name in MTP_TENSORS:
        assert same(made[name], source[name])
        assert name.removesuffix(".weight") in config["quantization_config"]["ignore"]
    assert modelopt["exclude_modules"] == config["quantization_config"]["ignore"]
    assert "lm_head" in modelopt["exclude_modules"]


def test_fused_linears_share_their_scales(built: dict[str, Path], source: dict[str, torch.Tensor]) -> None:
    made = weights(built["nvfp4-mtp-vlm"])
    for layer in range(4):
        start = f"model.language_model.layers.{layer}."
        for group in FUSED[:3]:
            present = [start + part for part in group if f"{start}{part}.weight_scale_2" in made]
            if not present:
                continue
            amax = max(source[f"{part}.weight"].float().abs().max() for part in present)
            for part in present:
                assert made[f"{part}.weight_scale_2"] == amax / (6 * 448)
                assert made[f"{part}.input_scale"] == made[f"{present[0]}.input_scale"]


def test_input_scale_is_the_running_max_over_samples(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "Mia lives in Brook."}), json.dumps({"text": "99 + 99 = 198. " * 9})]
    scales = []
    for number, chosen in enumerate([lines[:1], lines[1:], lines]):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("\n".join(chosen))
        quantize(BUILTIN_MODEL, tmp_path / f"out{number}", "nvfp4-mtp-text", calibration=[str(file)], silent=True)
        made = weights(tmp_path / f"out{number}")
        scales.append({name: float(t) for name, t in made.items() if name.endswith("input_scale")})
    assert len(scales[2]) == 3 * 6 + 7
    for name, value in scales[2].items():
        assert value == max(scales[0][name], scales[1][name])


def test_in_proj_ab_can_be_quantized_as_older_builds_did(tmp_path: Path) -> None:
    recipe = load_recipe("nvfp4-mtp-vlm").model_copy(update={"in_proj_ab": "nvfp4", "constant_input_scale": 0.01})
    quantize(BUILTIN_MODEL, tmp_path / "out", recipe, silent=True)
    made = weights(tmp_path / "out")
    pair = [made[f"model.language_model.layers.0.linear_attn.in_proj_{x}.weight_scale_2"] for x in "ab"]
    assert pair[0] == pair[1]
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert not any("in_proj_a" in name for name in ignore)
    assert any("conv1d" in name for name in ignore)
    assert made["model.language_model.layers.0.mlp.up_proj.input_scale"] == torch.tensor(0.01)


def test_recipes_differ_as_they_say(built: dict[str, Path]) -> None:
    configs = {name: json.loads((path / "config.json").read_text()) for name, path in built.items()}
    assert configs["nvfp4-mtp-text"]["language_model_only"] is True
    assert configs["nvfp4-mtp-vlm"]["language_model_only"] is False
    assert not any("visual" in n for n in configs["nvfp4-mtp-text"]["quantization_config"]["ignore"])
    assert any("visual" in n for n in configs["nvfp4-mtp-vlm"]["quantization_config"]["ignore"])
    assert configs["nvfp4-kvfp8-vlm"]["quantization_config"]["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert "kv_cache_scheme" not in configs["nvfp4-mtp-vlm"]["quantization_config"]


def test_other_files_go_over_byte_for_byte(built: dict[str, Path], tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json"):
        assert (built["nvfp4-mtp-vlm"] / name).read_bytes() == (BUILTIN_MODEL / name).read_bytes()
    changed = copy_model(tmp_path / "changed")
    config = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps({**config, "backend": "tokenizers", "tokenizer_class": "TokenizersBackend"}))
    quantize(changed, tmp_path / "out", "nvfp4-mtp-vlm", calibration=["builtin"], silent=True)
    cleaned = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "backend" not in cleaned
    assert cleaned == {**config, "tokenizer_class": "Qwen2TokenizerFast"}


def copy_model(to: Path) -> Path:
    to.mkdir()
    for file in BUILTIN_MODEL.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_the_record_says_what_was_made(built: dict[str, Path]) -> None:
    out = built["nvfp4-mtp-vlm"]
    record = json.loads((out / "mtpress.json").read_text())
    for name, digest in record["output_sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert set(record["output_sha256"]) == {p.name for p in out.iterdir()} - {"mtpress.json", "model.safetensors.index.json"}
    file = BUILTIN_MODEL / "model.safetensors"
    assert record["source"]["files"].keys() == {"model.safetensors"}
    assert record["source"]["files"]["model.safetensors"]["size"] == file.stat().st_size
    stored = Checkpoint.open(BUILTIN_MODEL).tensors
    with file.open("rb") as weights_file:
        lines = []
        for name in sorted(n for n in weights(out) if f"{n}_scale" in weights(out)):
            weights_file.seek(stored[name].offset)
            lines.append(f"{name} {hashlib.sha256(weights_file.read(stored[name].num_bytes)).hexdigest()}\n")
    assert len(lines) == 25
    assert record["source"]["quantized_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert record["recipe"]["name"] == "nvfp4-mtp-vlm"
    assert record["calibration"]["num_samples"] == 20
    expected = load_calibration(BUILTIN_MODEL, load_recipe("nvfp4-mtp-vlm").calibration, ["builtin"])
    assert record["calibration"]["sha256"] == expected.identity
    assert record["peak_memory_bytes"] > 0
    assert record["seconds"]["total"] > 0


def test_index_and_metadata(built: dict[str, Path]) -> None:
    out = built["nvfp4-mtp-vlm"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    made = weights(out)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in made.values())
    assert index["weight_map"].keys() == made.keys()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_dry_run_writes_nothing_and_tells_the_truth(built: dict[str, Path], tmp_path: Path) -> None:
    result = quantize(BUILTIN_MODEL, tmp_path / "out", "nvfp4-mtp-vlm", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert result.output_bytes == sum(t.numel() * t.element_size() for t in weights(built["nvfp4-mtp-vlm"]).values())
    assert sum(result.bytes_by_component.values()) == result.output_bytes
    assert Checkpoint.open(built["nvfp4-mtp-vlm"]).num_bytes == result.output_bytes


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        quantize(BUILTIN_MODEL, tmp_path, "nvfp4-mtp-vlm")
