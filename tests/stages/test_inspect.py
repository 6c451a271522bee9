import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import Edit, pack_int4
from full_size import make_full_size, tensors, write_sparse
from mtpress.checkpoint.checkpoint import INDEX_NAME, Checkpoint
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.plan.plan import Plan, make_plan
from mtpress.plan.recipe import load_recipe, shipped
from mtpress.quantization.output_files import config_files
from mtpress.stages.inspect import InspectResult, inspect
from qwen3_6_files import TINY, files

SHARD = "model-00001-of-00001.safetensors"
Tensors = list[OutputTensor]
Config = dict[str, Any]


def build(out: Path, stored: Tensors, config: Config, hf_quant_config: Config | None = None) -> Path:
    """A checkpoint of headers only."""
    beside = files(TINY, 4) | {"config.json": json.dumps(config).encode()}
    if hf_quant_config is not None:
        beside["hf_quant_config.json"] = json.dumps(hf_quant_config).encode()
    write_sparse(out, {SHARD: stored}, beside)
    return out


def plain(out: Path) -> Path:
    return build(out, tensors(TINY, 4), tiny_config())


def tiny_config() -> Config:
    return dict(json.loads(files(TINY, 4)["config.json"]))


def nvfp4_plan(tmp_path: Path, recipe: str = "nvfp4-mtp-vlm") -> Plan:
    return make_plan(Checkpoint.open(plain(tmp_path / "source")), load_recipe(recipe))


def nvfp4(tmp_path: Path, change: Callable[[Tensors, Config], Tensors | None] = lambda stored, config: None) -> InspectResult:
    """What inspect says of an NVFP4 build of which `change` has altered tensors or config.json."""
    plan = nvfp4_plan(tmp_path)
    written = {name: json.loads(content) for name, content in config_files(plan).items()}
    stored = [tensor for group in plan.shards.values() for tensor in group]
    config = written["config.json"]
    stored = change(stored, config) or stored
    hf_quant_config = written["hf_quant_config.json"]
    hf_quant_config["quantization"]["exclude_modules"] = config.get("quantization_config", {}).get("ignore", [])
    return inspect(build(tmp_path / "nvfp4", stored, config, hf_quant_config if "quantization_config" in config else None))


def repacked(kind: str, quantized: list[str]) -> Tensors:
    """The tensors of a build whose `quantized` modules lie in another format's layout."""
    stored: Tensors = []
    for tensor in tensors(TINY, 4):
        module = qwen3_5.module_of(tensor.name)
        if module not in quantized:
            stored.append(tensor)
            continue
        n, k = tensor.shape
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "compressed-tensors": {
                "weight_packed": ("U8", (n, k // 2)), "weight_scale": ("F8_E4M3", (n, k // 16)),
                "weight_global_scale": ("F32", (1,)), "input_global_scale": ("F32", (1,)),
            },
            "int4": {"weight_packed": ("I32", (n, k // 8)), "weight_scale": ("BF16", (n, k // 128)), "weight_shape": ("I64", (2,))},
            "gptq": {"qweight": ("I32", (k // 8, n)), "qzeros": ("I32", (k // 128, n // 8)), "scales": ("F16", (k // 128, n))},
        }[kind]  # fmt: skip
        stored += [OutputTensor(f"{module}.{suffix}", dtype, shape) for suffix, (dtype, shape) in parts.items()]
    return stored


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "27b"
    make_full_size(out, sparse=True)
    return out


def test_27b_by_component(headers: Path) -> None:
    started = time.process_time()
    found = inspect(headers)
    assert time.process_time() - started < 2.0
    assert (found.num_tensors, found.num_params, found.num_bytes) == (1199, 27_781_427_952, 55_562_855_904)
    assert found.layers == {"linear_attention": 48, "full_attention": 16}
    assert {part: holds.num_tensors for part, holds in found.components.items()} == {
        "embeddings": 1, "gdn": 384, "attention": 64, "mlp": 192, "norms": 209, "lm_head": 1, "mtp": 15, "vision": 333,
    }  # fmt: skip
    assert found.components["mlp"].num_params == 64 * 3 * 5120 * 17408
    assert found.components["vision"].num_params == 460_730_096
    assert found.components["mtp"].dtypes == {"BF16": 15}
    assert sum(holds.num_bytes for holds in found.components.values()) == found.num_bytes
    assert found.quantization is None
    assert (found.draft_head.state, found.draft_head.num_tensors, found.draft_head.ignored) == ("whole", 15, None)


def test_27b_sizes_and_fit_of_every_recipe(headers: Path) -> None:
    found = inspect(headers)
    assert list(found.recipes) == list(shipped())
    vlm, text, fp8 = (found.recipes[name] for name in ("nvfp4-mtp-vlm", "nvfp4-mtp-text", "nvfp4-kvfp8-vlm"))
    assert vlm.num_bytes == make_plan(Checkpoint.open(headers), load_recipe("nvfp4-mtp-vlm")).output_bytes
    assert vlm.num_bytes is not None
    assert 20.4e9 < vlm.num_bytes < 20.8e9  # the size of the published builds
    assert text.num_bytes == vlm.num_bytes - found.components["vision"].num_bytes
    assert vlm.context_tokens and text.context_tokens and fp8.context_tokens and found.as_it_is.context_tokens
    assert vlm.context_tokens["24 GB"] == 0
    assert vlm.context_tokens["32 GB"] > 100_000
    assert fp8.context_tokens["32 GB"] == pytest.approx(2 * vlm.context_tokens["32 GB"], rel=0.02)
    assert text.context_tokens["32 GB"] > vlm.context_tokens["32 GB"]
    assert found.as_it_is.context_tokens["48 GB"] == 0


def test_no_torch_and_no_weights(headers: Path) -> None:
    code = (
        "import sys\nfrom mtpress.cli import main\n"
        f"assert main(['inspect', {str(headers)!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "27,781,427,952" in done.stdout


def test_an_nvfp4_build_has_the_parameters_of_its_source(tmp_path: Path) -> None:
    before, after = inspect(plain(tmp_path / "bf16")), nvfp4(tmp_path)
    assert {k: v.num_params for k, v in before.components.items()} == {k: v.num_params for k, v in after.components.items()}
    assert after.components["mlp"].dtypes == {"F32": 24, "U8": 12, "F8_E4M3": 12}
    assert after.quantization is not None
    assert after.quantization.declared == {"config.json": "modelopt NVFP4 (W4A4)", "hf_quant_config.json": "modelopt NVFP4 (W4A4)"}
    assert after.quantization.modules == {"NVFP4": 12 + 3 * 3 + 4}
    assert after.quantization.agrees
    assert (after.draft_head.state, after.draft_head.ignored) == ("whole", True)
    assert after.num_bytes < before.num_bytes
    for refused in after.recipes.values():
        assert refused.refusal is not None
        assert refused.refusal.startswith("is quantized already")


@pytest.mark.parametrize(
    ("kind", "config", "title", "form"),
    [
        ("compressed-tensors", {"quant_method": "compressed-tensors", "ignore": ["re:.*mtp.*", "lm_head"]}, "compressed-tensors",
         "compressed-tensors NVFP4"),
        ("int4", {"quant_method": "compressed-tensors", "ignore": ["mtp.fc"]}, "compressed-tensors", "compressed-tensors INT4"),
        ("gptq", {"quant_method": "auto-round", "bits": 4, "block_name_to_quantize": "model.language_model.layers"}, "AutoRound INT4",
         "GPTQ/AutoRound INT4"),
        ("gptq", {"quant_method": "gptq", "bits": 4, "ignore": ["mtp"]}, "GPTQ INT4", "GPTQ/AutoRound INT4"),
    ],
)  # fmt: skip
def test_other_formats_are_recognised(kind: str, config: Config, title: str, form: str, tmp_path: Path) -> None:
    modules = [f"model.language_model.layers.{i}.mlp.{part}_proj" for i in range(4) for part in ("gate", "up", "down")]
    before = inspect(plain(tmp_path / "bf16"))
    after = inspect(build(tmp_path / kind, repacked(kind, modules), tiny_config() | {"quantization_config": config}))
    assert {k: v.num_params for k, v in before.components.items()} == {k: v.num_params for k, v in after.components.items()}
    assert after.quantization is not None
    assert after.quantization.declared == {"config.json": title}
    assert after.quantization.modules == {form: 12}
    assert after.draft_head.ignored


def undeclared(stored: Tensors, config: Config) -> None:
    del config["quantization_config"]


def unpacked(stored: Tensors, config: Config) -> Tensors:
    return tensors(TINY, 4)


def ignores_a_packed_module(stored: Tensors, config: Config) -> None:
    config["quantization_config"]["ignore"].append("model.language_model.layers.0.mlp.down_proj")


def forgets_a_plain_module(stored: Tensors, config: Config) -> None:
    names = ("model.language_model.layers.0.linear_attn.in_proj_a", "model.language_model.layers.0.linear_attn.in_proj_b")
    config["quantization_config"]["ignore"] = [name for name in config["quantization_config"]["ignore"] if name not in names]


def splits_a_fused_linear(stored: Tensors, config: Config) -> None:
    config["quantization_config"]["ignore"].append("model.language_model.layers.3.self_attn.q_proj")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (undeclared, "no config says so"),
        (unpacked, "no module is stored quantized"),
        (ignores_a_packed_module, "1 module in NVFP4 that the engine takes as BF16"),
        (forgets_a_plain_module, "2 modules in BF16 that the engine takes as quantized"),
        (splits_a_fused_linear, "some, not all, shards"),
    ],
)
def test_what_is_declared_is_held_against_what_is_stored(
    change: Callable[[Tensors, Config], Tensors | None], word: str, tmp_path: Path
) -> None:
    found = nvfp4(tmp_path, change).quantization
    assert found is not None
    assert not found.agrees
    assert word in " ".join(found.problems)


def without(*names: str) -> Callable[[Tensors, Config], Tensors]:
    return lambda stored, config: [tensor for tensor in stored if tensor.name not in names]


def packed_fc(stored: Tensors, config: Config) -> Tensors:
    parts = [("qweight", "I32", (64, 256)), ("qzeros", "I32", (4, 32)), ("scales", "F16", (4, 256))]
    return [t for t in stored if t.name != "mtp.fc.weight"] + [OutputTensor(f"mtp.fc.{s}", d, shape) for s, d, shape in parts]


def under_the_body(stored: Tensors, config: Config) -> Tensors:
    return [
        OutputTensor(t.name.replace("mtp.", "model.language_model.mtp.") if t.name.startswith("mtp.") else t.name, t.dtype, t.shape)
        for t in stored
    ]


def not_ignored(stored: Tensors, config: Config) -> None:
    entries = config["quantization_config"]["ignore"]
    config["quantization_config"]["ignore"] = [entry for entry in entries if not entry.startswith("mtp.")]


def not_declared(stored: Tensors, config: Config) -> None:
    del config["text_config"]["mtp_num_hidden_layers"]


def none_at_all(stored: Tensors, config: Config) -> Tensors:
    not_declared(stored, config)
    return without(*qwen3_5.MTP_TENSORS)(stored, config)


@pytest.mark.parametrize(
    ("change", "state", "num_tensors", "ignored", "word"),
    [
        (without("mtp.norm.weight", "mtp.fc.weight"), "missing", 13, True, "lacks 2 of its 15 tensors"),
        (without(*qwen3_5.MTP_TENSORS), "missing", 0, True, "lacks 15 of its 15"),
        (packed_fc, "quantized", 17, True, "1 module of the draft head stored as GPTQ"),
        (under_the_body, "misplaced", 15, True, "under other names: model.language_model.mtp.*, must be mtp.*"),
        (not_ignored, "not-ignored", 15, False, "of the draft in BF16 that the engine takes as quantized"),
        (not_declared, "not-declared", 15, True, "mtp_num_hidden_layers nowhere"),
        (none_at_all, "none", 0, True, "promises none"),
    ],
)  # fmt: skip
def test_the_state_of_the_draft_head(
    change: Callable[[Tensors, Config], Tensors | None], state: str, num_tensors: int, ignored: bool, word: str, tmp_path: Path
) -> None:
    head = nvfp4(tmp_path, change).draft_head
    assert (head.state, head.num_tensors, head.ignored) == (state, num_tensors, ignored)
    assert word in " ".join(head.problems)


def test_a_source_that_no_recipe_takes_says_why(tmp_path: Path) -> None:
    found = inspect(build(tmp_path / "c", without("mtp.fc.weight")(tensors(TINY, 4), {}), tiny_config()))
    assert found.draft_head.state == "missing"
    for refused in found.recipes.values():
        assert refused.num_bytes is None
        assert refused.refusal is not None
        assert "mtpress graft CKPT OUT --from BASE" in refused.refusal
        assert str(tmp_path) not in refused.refusal


def test_tensors_outside_the_index_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = plain(tmp_path / "c")
    index = json.loads((path / INDEX_NAME).read_text())
    del index["weight_map"]["mtp.fc.weight"]
    (path / INDEX_NAME).write_text(json.dumps(index))
    found = inspect(path)
    assert found.num_unindexed == 1
    assert found.draft_head.state == "unindexed"
    assert main(["inspect", str(path)]) == 0
    assert "1 tensor stored but not in the index" in capsys.readouterr().out


def test_the_text_says_it_all(headers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(headers)]) == 0
    shown = capsys.readouterr().out
    for word in (
        "64 layers (48 linear attention, 16 full attention)", "Gated DeltaNet", "17,112,760,320", "55.6 GB", "quantization: none",
        "draft head: whole, 15 tensors", "nvfp4-mtp-vlm", "20.6 GB", "101k", "one at a time",
    ):  # fmt: skip
        assert word in shown


def test_json_is_the_result(headers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(headers), "--json"]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document == json.loads(json.dumps(inspect(headers).as_json()))
    assert document["recipes"]["nvfp4-mtp-vlm"]["context_tokens"]["24 GB"] == 0
    assert shown.err == ""


def test_a_text_only_build(tmp_path: Path) -> None:
    plan = nvfp4_plan(tmp_path, "nvfp4-mtp-text")
    written = {name: json.loads(content) for name, content in config_files(plan).items()}
    stored = [tensor for group in plan.shards.values() for tensor in group]
    found = inspect(build(tmp_path / "text", stored, written["config.json"], written["hf_quant_config.json"]))
    assert "vision" not in found.components
    assert found.quantization is not None
    assert found.quantization.agrees
    assert found.draft_head.state == "whole"


def test_what_is_no_checkpoint_of_the_family(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        inspect(tmp_path / "nowhere")
    path = build(tmp_path / "llama", tensors(TINY, 4), tiny_config() | {"model_type": "llama"})
    with pytest.raises(InputError, match="'llama' is not supported"):
        inspect(path)


FORMATS = {
    "compressed-tensors": ("compressed-tensors NVFP4 (W4A4)", 4, 16, "nvfp4-pack-quantized", "compressed-tensors NVFP4"),
    "compressed-tensors-w4a16": ("compressed-tensors NVFP4 (W4A16)", 4, 16, "nvfp4-pack-quantized", "compressed-tensors NVFP4"),
    "compressed-tensors-int4": ("compressed-tensors INT4 g32", 4, 32, "pack-quantized", "compressed-tensors INT4"),
    "auto-round": ("AutoRound INT4 g32", 4, 32, "auto_round:auto_gptq", "GPTQ/AutoRound INT4"),
    "gptq": ("GPTQ INT4 g32", 4, 32, "gptq", "GPTQ/AutoRound INT4"),
}


@pytest.mark.parametrize("kind", list(FORMATS))
def test_builds_of_each_format(kind: str, small_formats: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    title, bits, group_size, packing, form = FORMATS[kind]
    found = inspect(small_formats[kind])
    held = found.quantization
    assert held is not None
    assert set(held.declared.values()) == {title}
    assert (held.bits, held.group_size, held.symmetric, held.packing) == (bits, group_size, True, packing)
    assert (held.modules, held.agrees, held.problems) == ({form: 25}, True, ())
    assert (found.draft_head.state, found.draft_head.ignored) == ("whole", True)
    mlp, head = found.components["mlp"], found.components["mtp"]
    assert mlp.bits is not None
    assert 4.5 <= mlp.bits < 5.1  # GPTQ has g_idx too
    assert head.bits == 16
    assert main(["inspect", str(small_formats[kind])]) == 0
    shown = capsys.readouterr().out
    for word in (title, f"packed as {packing}", "they agree", "draft head: whole, 15 tensors in 16 bits, in the ignore list"):
        assert word in shown


def test_a_draft_layer_that_auto_round_rounded(small_formats: dict[str, Path], tmp_path: Path) -> None:
    edit = Edit(Path(shutil.copytree(small_formats["auto-round"], tmp_path / "rounded")))
    pack_int4(edit, "mtp.layers.0.mlp.down_proj")
    edit.quantization["extra_config"] |= {f"mtp.layers.0.{x}": {"bits": 16} for x in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")}
    edit.quantization["extra_config"] |= {f"mtp.layers.0.self_attn.{x}_proj": {"bits": 16} for x in "qkv"}
    edit.quantization["block_name_to_quantize"] += ",mtp.layers"
    edit.save()
    head = inspect(edit.path).draft_head
    assert (head.state, head.ignored) == ("rounded", False)
    assert head.problems == ("1 module of the draft layer stored as GPTQ/AutoRound INT4, not BF16",)
