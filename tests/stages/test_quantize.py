"""quantize, end to end on the built-in model: every byte of the output is accounted for."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mtpress.builtin import BUILTIN_MODEL
from mtpress.calibration.samples import load_calibration
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.formats import int4, nvfp4
from mtpress.models.qwen3_5.names import MTP_TENSORS, module_of
from mtpress.plan.plan import make_plan
from mtpress.plan.recipe import CalibrationSource, SignRound, load_recipe, parse_recipe, shipped
from mtpress.stages.quantize import quantize, show

FUSED = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]
SMALL = CalibrationSource(num_samples=3, max_seq_len=64)
FUSED += [("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), ("linear_attn.in_proj_b", "linear_attn.in_proj_a")]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture(scope="module")
def source() -> dict[str, torch.Tensor]:
    return weights(BUILTIN_MODEL)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of every shipped recipe; sign-gradient rounding with two iterations, which is as good for what is asked here."""
    found = {}
    for name in shipped():
        found[name] = tmp_path_factory.mktemp("built") / name
        recipe = load_recipe(name)
        quick = SignRound(iterations=2, batch_size=8)
        if recipe.rounding in ("signround", "gptq"):
            recipe = recipe.model_copy(update={"signround": quick, "calibration": SMALL})
        quantize(BUILTIN_MODEL, found[name], recipe, calibration=["builtin"], silent=True)
    return found


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a.reshape(-1)), bits(b.reshape(-1)))


NVFP4 = [name for name in shipped() if load_recipe(name).format == "nvfp4"]
INT4 = [name for name in shipped() if load_recipe(name).format == "int4"]


@pytest.mark.parametrize("recipe", NVFP4)
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
            # NVFP4 of anything near Gaussian is about 0.095; GPTQ trades it for the output's
            assert 0.02 < error < (0.2 if load_recipe(recipe).rounding == "gptq" else 0.13)
        else:
            assert same(made.pop(name), tensor), name
    assert not made


@pytest.mark.parametrize("recipe", INT4)
def test_every_tensor_is_kept_or_int4(recipe: str, built: dict[str, Path], source: dict[str, torch.Tensor]) -> None:
    made = weights(built[recipe])
    plan = make_plan(Checkpoint.open(BUILTIN_MODEL), load_recipe(recipe))
    assert len(plan.quantized_modules) == 25
    for name, tensor in source.items():
        if (module := module_of(name)) in plan.quantized_modules:
            stored = [made.pop(f"{module}.{suffix}") for suffix in (int4.QWEIGHT, int4.QZEROS, int4.SCALES)]
            assert set(stored[1].flatten().tolist()) == {0x77777777}
            error = (int4.dequantize(*stored) - tensor.float()).norm() / tensor.float().norm()
            assert 0.02 < error < 0.14  # plain INT4 of anything near Gaussian is about 0.103
        else:
            assert same(made.pop(name), tensor), name
    assert not made


@pytest.mark.parametrize("recipe", NVFP4)
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


@pytest.mark.parametrize("recipe", INT4)
def test_both_int4_configs_name_the_head_and_every_other_matrix_that_is_kept(recipe: str, built: dict[str, Path]) -> None:
    made = weights(built[recipe])
    config = json.loads((built[recipe] / "config.json").read_text())["quantization_config"]
    assert json.loads((built[recipe] / "quantization_config.json").read_text()) == config
    assert not (built[recipe] / "hf_quant_config.json").exists()
    kept = {module_of(name) for name, tensor in made.items() if name.endswith(".weight") and tensor.dim() == 2}
    assert config["extra_config"].keys() == {name for name in kept if not name.endswith("_embed") and not name.endswith("embed_tokens")}
    assert {f"{name}.weight" for name in config["extra_config"] if name.startswith("mtp.")} < set(MTP_TENSORS)
    assert {"mtp.fc", "mtp.layers.0.mlp.down_proj", "lm_head"} < config["extra_config"].keys()
    assert all(entry == {"bits": 16, "data_type": "fp"} for entry in config["extra_config"].values())
    assert config["block_name_to_quantize"] == "model.language_model.layers"
    assert config["iters"] == (2 if recipe == "int4-autoround-mtp" else 0)
    packed = {module_of(name) for name in made if name.endswith(".qweight")}
    assert packed and all(name.startswith(config["block_name_to_quantize"]) for name in packed)


def test_int4_without_a_vision_tower(tmp_path: Path) -> None:
    recipe = load_recipe("int4-mtp-vlm").model_copy(update={"vision": "drop", "rounding": "rtn"})
    result = quantize(BUILTIN_MODEL, tmp_path / "out", recipe, silent=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["language_model_only"] is True and result.num_dropped > 0
    assert not any("visual" in name for name in (*weights(tmp_path / "out"), *config["quantization_config"]["extra_config"]))


@pytest.mark.parametrize("spread", [{"workers": 2}, {"ray": "local"}])
def test_sign_gradient_rounding_is_not_spread(spread: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rounding signround goes through .* leave --workers and --ray out") as raised:
        quantize(BUILTIN_MODEL, tmp_path / "out", "int4-autoround-mtp", calibration=["builtin"], silent=True, **spread)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nvfp4-mtp-vlm", "int4-mtp-vlm"])
def test_gptq_is_not_spread(name: str, tmp_path: Path) -> None:
    recipe = parse_recipe({**load_recipe(name).canonical(), "rounding": "gptq"}, "a test")
    with pytest.raises(InputError, match=r"rounding gptq goes through .* leave --workers and --ray out, or take rounding hessian$"):
        quantize(BUILTIN_MODEL, tmp_path / "out", recipe, calibration=["builtin"], silent=True, workers=2)
    assert not list(tmp_path.iterdir())


def test_gptq_of_one_sample_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    lone = {"rounding": "gptq", "calibration": {"num_samples": 1}}
    recipe = parse_recipe({**load_recipe("nvfp4-mtp-vlm").canonical(), **lone}, "a test")
    with pytest.raises(InputError, match="rounding gptq needs at least two calibration samples"):
        quantize(BUILTIN_MODEL, tmp_path / "out", recipe, calibration=["builtin"], silent=True)
    assert not list(tmp_path.iterdir())


def test_gptq_stores_what_rounding_max_does_but_for_the_codes(tmp_path: Path) -> None:
    """All samples give the amax of the inputs, the one that is held out too; the BF16 stream is the same."""
    recipe, chosen_scales = load_recipe("nvfp4-mtp-vlm"), {"rounding": "gptq", "gptq": {"scales": "max"}}
    plain, by_gptq = (recipe.model_copy(update={"calibration": SMALL}), tmp_path / "max"), (
        parse_recipe({**recipe.canonical(), **chosen_scales, "calibration": SMALL.model_dump()}, "a test"), tmp_path / "gptq"
    )  # fmt: skip
    made = []
    for chosen, out in (plain, by_gptq):
        quantize(BUILTIN_MODEL, out, chosen, calibration=["builtin"], silent=True)
        made.append(weights(out))
    assert made[0].keys() == made[1].keys()
    differ = {name for name in made[0] if not same(made[0][name], made[1][name])}
    losses = json.loads((by_gptq[1] / "mtpress.json").read_text())["losses"]
    kept = [layer for layer, said in losses.items() if said["kept_gptq"]]
    assert kept and all(said["kept_gptq"] == (said["gptq"] < said["nearest"]) for said in losses.values())
    assert differ == {
        f"{name}.weight" for name in make_plan(Checkpoint.open(BUILTIN_MODEL), recipe).quantized_modules if name.split(".")[3] in kept
    }
    assert (by_gptq[1] / "config.json").read_bytes() == (plain[1] / "config.json").read_bytes()


def test_weight_only_is_a_word_of_nvfp4(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["quantize", str(BUILTIN_MODEL), str(tmp_path / "out"), "--recipe", "int4-mtp-vlm", "--weight-only", "0.01"]
    assert main(command) == 2
    assert "constant_input_scale does not go with format int4" in capsys.readouterr().err


def test_linears_that_do_not_fit_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtpress.plan import plan

    narrow = dataclasses.replace(plan.LAYOUTS["int4"], n_multiple=512)  # in_proj_qkv has 512 rows, in_proj_z 256
    monkeypatch.setitem(plan.LAYOUTS, "int4", narrow)
    result = quantize(BUILTIN_MODEL, tmp_path / "out", "int4-mtp-vlm", silent=True)
    start = "model.language_model.layers.0.linear_attn.in_proj_"
    assert {f"{start}qkv", f"{start}z"} < set(result.misfits)
    assert json.loads((tmp_path / "out" / "mtpress.json").read_text())["misfits"] == list(result.misfits)
    extra = json.loads((tmp_path / "out" / "quantization_config.json").read_text())["extra_config"]
    assert set(result.misfits) < extra.keys()
    show(result)
    said = "".join(capsys.readouterr().out.split())
    assert all(name in said for name in result.misfits)


@pytest.mark.parametrize("rounding", ["rtn", "search"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(float("nan"), "holds NaN or infinite values"), (float("inf"), "holds NaN or infinite"), (1e6, "FP16 has no scale")],
)
def test_int4_says_which_matrix_cannot_be_rounded(rounding: str, damage: float, words: str, tmp_path: Path) -> None:
    model = copy_model(tmp_path / "damaged")
    stored = load_file(model / "model.safetensors")
    stored["model.language_model.layers.2.mlp.up_proj.weight"][5, 7] = damage
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    recipe = load_recipe("int4-mtp-vlm").model_copy(update={"rounding": rounding})
    with pytest.raises(InputError, match=rf"layers\.2\.mlp\.up_proj\.weight.*{words}"):
        quantize(model, tmp_path / "out", recipe, silent=True)
    assert not (tmp_path / "out").exists()


def test_a_kept_tensor_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "damaged")
    stored = load_file(model / "model.safetensors")
    stored["mtp.fc.weight"][5, 7] = float("nan")
    save_file(stored, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"mtp\.fc\.weight holds NaN or infinite values"):
        quantize(model, tmp_path / "out", "int4-mtp-vlm", silent=True)
    assert {path.name for path in tmp_path.iterdir()} == {"damaged"}


def test_a_file_that_no_index_names_is_said_to_be_left_out(tmp_path: Path) -> None:
    model = copy_model(tmp_path / "model")
    save_file({"base_model.model.layers.0.lora_A.weight": torch.ones(1)}, model / "adapter_model.safetensors", {"format": "pt"})
    notes = quantize(model, tmp_path / "out", "int4-mtp-vlm", dry_run=True, silent=True).notes
    assert any(note.startswith("LEFT OUT: ") and "adapter_model.safetensors" in note for note in notes)


def test_the_record_has_the_losses_of_every_layer(built: dict[str, Path]) -> None:
    record = json.loads((built["int4-autoround-mtp"] / "mtpress.json").read_text())
    assert list(record["losses"]) == ["0", "1", "2", "3"]
    assert all(0 < losses["best"] <= losses["before"] for losses in record["losses"].values())
    assert record["recipe"]["signround"] == {"iterations": 2, "batch_size": 8}
    assert record["calibration"]["num_samples"] == 3
    plain = json.loads((built["int4-mtp-vlm"] / "mtpress.json").read_text())
    assert plain["calibration"] is None and "losses" not in plain and "signround" not in plain["recipe"]


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


def test_template_and_sampling_are_those_of_the_recipe(built: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the files, the record and the dry run."""
    source = json.loads((BUILTIN_MODEL / "generation_config.json").read_text())
    said = {"temperature": 0.7, "top_p": 0.95, "top_k": 20}
    for name, directory in built.items():
        recipe, record = load_recipe(name), json.loads((directory / "mtpress.json").read_text())
        own = recipe.generation_config.said() if recipe.generation_config else {}
        written = json.loads((directory / "generation_config.json").read_text())
        assert written == source | own
        assert record["chat_template"] == recipe.chat_template
        assert record["generation_config"] == {"do_sample": True, **said, **own}
    dry = quantize(BUILTIN_MODEL, tmp_path / "out", "nvfp4-cascade-vlm", calibration=["builtin"], dry_run=True, silent=True)
    assert dry.chat_template == "mtpress"
    assert dry.generation_config == {"do_sample": True, **said, "repetition_penalty": 1.1}
    show(dry)
    shown = " ".join(capsys.readouterr().out.split())
    assert "chat template: mtpress's own; sampling: temperature 0.7, top_p 0.95, top_k 20, repetition_penalty 1.1" in shown


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
            content = weights_file.read(stored[name].num_bytes)
            sample = content if len(content) <= 2 * 65536 else content[:65536] + content[-65536:]
            lines.append(f"{name} {hashlib.sha256(sample).hexdigest()}\n")
    assert len(lines) == 25
    assert record["source"]["quantized_sample_sha256"] == hashlib.sha256("".join(lines).encode()).hexdigest()
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
