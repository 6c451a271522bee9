"""graft: the base's head into every format and layout; what it repairs on the way, what it refuses, and what it never touches."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import PREFIX, small_config, small_files, small_tensors, write_small
from mtpress.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.models.qwen3_5 import names as qwen3_5
from mtpress.models.qwen3_5.names import MTP_TENSORS, QUANTIZABLE, kept_modules, module_of
from mtpress.quant_config.view import Subject
from mtpress.stages.check import check
from mtpress.stages.graft import GraftResult, graft

Tensors = dict[str, torch.Tensor]
FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
LINEARS = {linear for part in QUANTIZABLE.values() for linear in part}
HEAD_LINEARS = [name.removesuffix(".weight") for name in MTP_TENSORS if module_of(name).rpartition(".")[2].endswith(("proj", "fc"))]
NVFP4_WEIGHTS = {"num_bits": 4, "group_size": 16, "strategy": "tensor_group", "symmetric": True, "type": "float"}


def modelopt(ignore: list[str]) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignore, "producer": {"name": "modelopt", "version": "0.47.0"}}


def compressed(ignore: list[str]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": NVFP4_WEIGHTS, "input_activations": {**NVFP4_WEIGHTS, "dynamic": "local"}}
    return {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}, "ignore": ignore}


def int4(ignore: list[str]) -> dict[str, Any]:
    extra = {name: {"bits": 16, "data_type": "fp"} for name in ignore}
    return {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32, "sym": True,
        "data_type": "int", "block_name_to_quantize": [f"{PREFIX}layers", "mtp.layers"], "extra_config": extra,
    }  # fmt: skip


def gptq(ignore: list[str]) -> dict[str, Any]:
    parts = ["self_attn", "mlp", "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj"]
    return {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "modules_in_block_to_quantize": parts}


FORMATS: dict[str, Callable[[list[str]], dict[str, Any]] | None] = {
    "plain": None, "modelopt": modelopt, "compressed-tensors": compressed, "auto-round": int4, "gptq": gptq,
}  # fmt: skip


def pack(tensors: Tensors, module: str, form: str) -> None:
    """A module in the layout of a format. Its numbers mean nothing; graft reads none."""
    n, k = tensors.pop(f"{module}.weight").shape
    if form in ("auto-round", "gptq"):
        packed = {
            "qweight": torch.full((k // 8, n), 7, dtype=torch.int32),
            "qzeros": torch.full((k // 32, n // 8), 0x77777777, dtype=torch.int32),
            "scales": torch.ones(k // 32, n, dtype=torch.float16),
        }
    else:
        ours = form == "modelopt"
        packed = {
            "weight" if ours else "weight_packed": torch.zeros(n, k // 2, dtype=torch.uint8),
            "weight_scale": torch.ones(n, k // 16).to(torch.float8_e4m3fn),
            "weight_scale_2" if ours else "weight_global_scale": torch.tensor(0.5 if ours else 2.0),
            "input_scale" if ours else "input_global_scale": torch.tensor(0.5 if ours else 2.0),
        }
    tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}


def missing(tensors: Tensors, form: str) -> None:
    for name in MTP_TENSORS:
        del tensors[name]


def quantized(tensors: Tensors, form: str) -> None:
    for module in HEAD_LINEARS:
        pack(tensors, module, "gptq" if form == "plain" else form)


def wrong(tensors: Tensors, form: str) -> None:
    tensors |= {name: torch.ones_like(tensors[name]) for name in MTP_TENSORS[:5]}


def misplaced(tensors: Tensors, form: str) -> None:
    for i, name in enumerate(MTP_TENSORS):
        tensors[("model.language_model." if i % 2 else "model.") + name] = tensors.pop(name)


def half(tensors: Tensors, form: str) -> None:
    for name in MTP_TENSORS[3:]:
        del tensors[name]


DAMAGE = (missing, quantized, wrong, misplaced, half)


def build(path: Path, form: str, damage: Callable[[Tensors, str], None] | None, layout: str) -> Path:
    """A finished checkpoint of a format with a damaged head, whose config says nothing of the head."""
    config, declare = small_config(), FORMATS[form]
    tensors = small_tensors(config)
    if declare is not None:
        for name in list(tensors):
            layer = qwen3_5.layer_index(name)
            if layer is not None and module_of(name).partition(f"layers.{layer}.")[2] in LINEARS:
                pack(tensors, module_of(name), form)
    if damage is not None:
        damage(tensors, form)
    if declare is not None:
        infos = {name: Stub(tensor) for name, tensor in tensors.items() if "mtp." not in name}
        config["quantization_config"] = declare(kept_modules(infos, PREFIX))
    path.mkdir(parents=True)
    if form == "modelopt":
        inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ["lm_head", "model.visual*"]}
        (path / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": inner}))
    if form == "auto-round":
        (path / "quantization_config.json").write_text(json.dumps(config["quantization_config"]))
    (path / "config.json").write_text(json.dumps(config))
    for name, content in small_files().items():
        (path / name).write_text(content)
    heads = [name for name in tensors if "mtp." in name]
    body = [name for name in tensors if name not in heads]
    files = {SINGLE_NAME: [*body, *heads]}
    if layout != "single":
        files = {FIRST: body[:30], SECOND: body[30:], **({THIRD: heads} if heads else {})}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, path / file, metadata={"format": "pt"})
    if layout == "shards":
        write_index(path, files)
    if layout == "head unindexed":
        write_index(path, {file: names for file, names in files.items() if file != THIRD})
    return path


def write_index(path: Path, files: dict[str, list[str]]) -> None:
    weight_map = {name: file for file, names in files.items() for name in names}
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


class Stub:
    """A tensor's header."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(tensor.dtype, "U8")
        self.shape = tuple(tensor.shape)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def stored(path: Path) -> Tensors:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def holds_the_head(out: Path, source: Path, base: Path) -> None:
    """All 15 tensors of the base, everything else as it was, and nothing more; the engine takes every linear for what it is."""
    made, before, theirs = stored(out), stored(source), stored(base)
    expected = {name: tensor for name, tensor in before.items() if "mtp." not in name} | {name: theirs[name] for name in MTP_TENSORS}
    assert made.keys() == expected.keys()
    assert [name for name in expected if not same_bytes(made[name], expected[name])] == []
    opened = Checkpoint.open(out)
    assert opened.tensors.keys() == expected.keys() and opened.index is not None
    assert opened.index["metadata"]["total_size"] == opened.num_bytes
    subject = Subject(opened)
    assert subject.model.text_config(subject.config)["mtp_num_hidden_layers"] == 1
    for declared in [d for d in (subject.declared, subject.hf_declared) if d is not None]:
        verdicts = subject.verdicts_of(declared)
        assert len(verdicts) > 20
        for linear, verdict in verdicts.items():
            plain = {subject.form(module) for module in linear.modules} == {"plain"}
            assert verdict == ("ignored" if plain else "quantized"), (linear.prefix, declared.file)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base's body is another, so that nothing but the head can have come from it."""
    return write_small(tmp_path_factory.mktemp("base") / "base", seed=7)


@pytest.mark.parametrize("layout", ["single", "shards", "head unindexed"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", list(FORMATS))
def test_every_format_gets_the_head(form: str, damage: Callable[[Tensors, str], None], layout: str, base: Path, tmp_path: Path) -> None:
    source = build(tmp_path / "source", form, damage, layout)
    before = digests(source)
    own = damage in (wrong, misplaced)  # whole and finite, under whatever prefix
    result = graft(source, tmp_path / "out", base, replace_head=own, silent=True)
    assert bool(result.own_head) == own
    holds_the_head(tmp_path / "out", source, base)
    assert digests(source) == before
    assert sorted((*result.replaced, *result.added, *result.kept)) == sorted(MTP_TENSORS)
    shared = {file for file in before if (tmp_path / "out" / file).exists() and (tmp_path / "out" / file).samefile(source / file)}
    assert set(result.linked) == shared
    if layout != "single":
        assert {FIRST, SECOND} <= set(result.linked)
    if damage is missing:
        assert result.new == ("model-mtp.safetensors",) and not result.rewritten and result.added == MTP_TENSORS
    if damage is wrong:
        assert result.replaced == MTP_TENSORS and not result.removed and not result.new
    if damage is misplaced:
        assert len(result.removed) == 15
    if damage is quantized:
        assert {name.rpartition(".")[0] for name in result.removed} <= set(HEAD_LINEARS) and result.removed
    if (form, damage) != ("plain", wrong):  # whose bytes only a comparison can tell
        assert any(finding.severity == "error" for finding in check(source, silent=True).findings)
    assert [finding for finding in check(tmp_path / "out", silent=True).findings if finding.severity != "note"] == []


def test_the_config_files_say_so(base: Path, tmp_path: Path) -> None:
    """Of two config files that the engine may read both name the whole head; a declaration that spares it stays as it is written."""
    source = build(tmp_path / "source", "modelopt", missing, "shards")
    result = graft(source, tmp_path / "out", base, silent=True)
    assert result.config_files == ("config.json", "hf_quant_config.json")
    config, hf = (json.loads((tmp_path / "out" / name).read_text()) for name in result.config_files)
    modules = {name.removesuffix(".weight") for name in MTP_TENSORS}
    assert modules <= set(config["quantization_config"]["ignore"]) and modules <= set(hf["quantization"]["exclude_modules"])
    config["quantization_config"]["ignore"] = ["lm_head", "mtp*", "*in_proj_[ab]", "model.visual*"]
    (source / "config.json").write_text(json.dumps(config))
    (source / "hf_quant_config.json").unlink()
    result = graft(source, tmp_path / "again", base, silent=True)
    assert result.config_files == ()
    assert (tmp_path / "again" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("top", [{}, {"mtp_num_hidden_layers": 0}])
@pytest.mark.parametrize("text", [{"mtp_num_hidden_layers": 0}, {"num_nextn_predict_layers": 1}, {"mtp_num_hidden_layers": None}])
def test_one_draft_layer_is_declared_where_engines_look(text: dict[str, Any], top: dict[str, Any], base: Path, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "plain", missing, "single")
    config = small_config() | top
    del config["text_config"]["mtp_num_hidden_layers"]
    config["text_config"] |= text
    (source / "config.json").write_text(json.dumps(config))
    assert graft(source, tmp_path / "out", base, silent=True).config_files == ("config.json",)
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert qwen3_5.num_mtp_layers(made) == made["text_config"]["mtp_num_hidden_layers"] == 1
    assert made == config | ({"mtp_num_hidden_layers": 1} if top else {}) | {
        "text_config": config["text_config"] | {"mtp_num_hidden_layers": 1}
    }


def test_a_text_only_checkpoint_takes_the_head_of_the_whole_model(small_nvfp4: dict[str, Path], base: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(small_nvfp4["nvfp4-mtp-text"], source)
    config = json.loads((source / "config.json").read_text())
    inner = config["text_config"] | {"architectures": ["Qwen3_5ForCausalLM"], "quantization_config": config["quantization_config"]}
    (source / "config.json").write_text(json.dumps(inner))
    result = graft(source, tmp_path / "out", base, replace_head=True, silent=True)
    assert result.replaced == MTP_TENSORS and result.config_files == ()
    holds_the_head(tmp_path / "out", source, base)


def test_a_head_that_is_the_base_s_already_has_nothing_to_gain(small_nvfp4: dict[str, Path], small_bf16: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has this draft head already, bit for bit, and its configs spare it; nothing to graft"):
        graft(small_nvfp4["nvfp4-mtp-vlm"], tmp_path / "out", small_bf16, silent=True)
    source = tmp_path / "source"
    shutil.copytree(small_nvfp4["nvfp4-mtp-vlm"], source)
    index = json.loads((source / INDEX_NAME).read_text())
    del index["weight_map"]["mtp.fc.weight"]
    (source / INDEX_NAME).write_text(json.dumps(index))
    result = graft(source, tmp_path / "out", small_bf16, silent=True)  # the index does not name all of it
    assert result.kept == MTP_TENSORS and not (result.rewritten or result.new or result.config_files)
    holds_the_head(tmp_path / "out", source, small_bf16)
    assert not list(tmp_path.glob("*.partial"))


def test_only_what_differs_is_replaced(base: Path, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "plain", None, "shards")
    theirs = stored(base)
    save_file({name: theirs[name] if name != "mtp.fc.weight" else stored(source)[name] for name in MTP_TENSORS}, source / THIRD)
    result = graft(source, tmp_path / "out", base, replace_head=True, silent=True)
    assert (result.replaced, len(result.kept), result.rewritten) == (("mtp.fc.weight",), 14, (THIRD,))


def head_with(path: Path, **changed: torch.Tensor) -> Path:
    """A sound checkpoint in shards with another draft head; `fc` and the like name tensors by their last words."""
    source = build(path, "plain", None, "shards")
    tensors = load_file(source / THIRD)
    tensors |= {name: tensor for name in tensors for end, tensor in changed.items() if name == f"mtp.{end}.weight"}
    save_file(tensors, source / THIRD, metadata={"format": "pt"})
    return source


def test_a_whole_head_of_its_own_is_replaced_by_word_alone(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = build(tmp_path / "source", "plain", None, "shards"), tmp_path / "out"
    assert main(["graft", str(source), str(out), "--from", str(base)]) == 2
    (refusal,) = capsys.readouterr().err.splitlines()
    for word in ("whole and finite", "15 of 15 tensors not the base's", "--replace-head"):
        assert word in refusal
    assert not out.exists()
    assert main(["graft", str(source), str(out), "--from", str(base), "--replace-head"]) == 0
    line = "replaced by the base's: a draft head of its own, whole and finite, 15 of 15 tensors not the base's"
    assert line in capsys.readouterr().out
    assert json.loads((out / "mtpress.json").read_text())["own_head"] == line
    assert main(["graft", str(source), str(tmp_path / "again"), "--from", str(base), "--replace-head", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["own_head"] == line


def test_what_is_damaged_or_the_base_s_own_needs_no_word(base: Path, tmp_path: Path) -> None:
    fc = stored(base)["mtp.fc.weight"]
    damaged = head_with(tmp_path / "damaged", fc=torch.full_like(fc, float("nan")))
    theirs = build(tmp_path / "theirs", "plain", None, "shards")
    save_file({name: stored(base)[name].float() for name in MTP_TENSORS}, theirs / THIRD)
    for source in (damaged, theirs):
        result = graft(source, tmp_path / f"{source.name}-out", base, silent=True)
        assert (result.own_head, len(result.replaced)) == ("", 15)


def test_a_shard_beside_the_index_with_unknown_tensors_stays_behind(base: Path, tmp_path: Path) -> None:
    """Engines skip it now; named by an index they would stop at it."""
    source = build(tmp_path / "source", "plain", missing, "shards")
    save_file({"optimizer.state": torch.zeros(3)}, source / "training.safetensors")
    result = graft(source, tmp_path / "out", base, silent=True)
    assert not (tmp_path / "out" / "training.safetensors").exists()
    assert result.warnings[-1] == "1 tensors of unknown names that no index named are left out (optimizer.state, …)"


def test_embeddings_of_another_size_are_told(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "base"
    shutil.copytree(base, other)
    tensors = load_file(other / SINGLE_NAME)
    tensors[f"{PREFIX}embed_tokens.weight"] = torch.zeros(320, 64, dtype=torch.bfloat16)
    save_file(tensors, other / SINGLE_NAME)
    result = graft(build(tmp_path / "source", "plain", missing, "single"), tmp_path / "out", other, silent=True)
    assert "embed_tokens is [288, 64] here and [320, 64] in the base" in result.warnings[-1]


@pytest.mark.parametrize("kind", ["source", "ancestor", "stranger"])
def test_what_the_base_is(kind: str, base: Path, tmp_path: Path) -> None:
    """A head has no embeddings, so a base of another vocabulary has one that fits."""
    other = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(other / SINGLE_NAME)
    set_text(other, vocab_size=320)
    tensors[f"{PREFIX}embed_tokens.weight"] = torch.zeros(320, 64, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = torch.zeros(320, 64, dtype=torch.bfloat16)
    save_file(tensors, other / SINGLE_NAME)
    source = Path(shutil.copytree(base, tmp_path / "source"))
    mine = {name: tensor for name, tensor in load_file(base / SINGLE_NAME).items() if not name.startswith("mtp.")}
    for name, tensor in mine.items():
        if kind != "source" and tensor.ndim > 1:
            noise = 0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
            mine[name] = (tensor.float() + 0.1 * noise if kind == "ancestor" else noise).to(torch.bfloat16)
    save_file(mine, source / SINGLE_NAME)
    result = graft(source, tmp_path / "out", other, silent=True)
    assert result.base_relation is not None
    assert result.base_relation.kind == kind
    assert len(result.added) == 15
    assert any("fewer of its drafts" in warning for warning in result.warnings) == (kind == "ancestor")
    assert any("another model" in warning for warning in result.warnings) == (kind == "stranger")
    assert graft(source, tmp_path / "again", other, base_is="source", silent=True).base_relation.line.startswith(  # type: ignore[union-attr]
        "the base is the source (as --base-is says)"
    )


def test_a_base_of_which_the_head_alone_was_fetched(base: Path, tmp_path: Path) -> None:
    """Its index names files that are not there."""
    part = tmp_path / "base"
    part.mkdir()
    shutil.copy(base / "config.json", part)
    theirs = stored(base)
    save_file({name: theirs[name] for name in MTP_TENSORS}, part / "model-00015-of-00015.safetensors")
    write_index(part, {"model-00001-of-00015.safetensors": ["lm_head.weight"], "model-00015-of-00015.safetensors": list(MTP_TENSORS)})
    source = build(tmp_path / "source", "gptq", quantized, "shards")
    graft(source, tmp_path / "out", part, silent=True)
    holds_the_head(tmp_path / "out", source, part)


def change(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path / SINGLE_NAME)
    edit(tensors)
    save_file(tensors, path / SINGLE_NAME, metadata={"format": "pt"})


def set_text(path: Path, **keys: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["text_config"] |= keys
    (path / "config.json").write_text(json.dumps(config))


def to_half(tensors: Tensors) -> None:
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].half()


def wide(tensors: Tensors) -> None:
    tensors["mtp.fc.weight"] = torch.zeros(64, 192, dtype=torch.bfloat16)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no head": (lambda b: change(b, lambda t: missing(t, "")), "has no draft head"),
    "quantized as INT4": (lambda b: change(b, lambda t: quantized(t, "gptq")), r"own draft head is quantized \(mtp.fc.qweight\)"),
    "quantized as NVFP4": (lambda b: change(b, lambda t: quantized(t, "modelopt")), "own draft head is quantized"),
    "quantized by compressed-tensors": (lambda b: change(b, lambda t: quantized(t, "compressed-tensors")), "weight_packed"),
    "incomplete": (lambda b: change(b, lambda t: half(t, "")), r"lacks 12 of 15 tensors \(mtp.pre_fc_norm_hidden.weight"),
    "in FP16": (lambda b: change(b, to_half), "mtp.fc.weight is F16, not BF16"),
    "two layers": (
        lambda b: change(b, lambda t: t.update({"mtp.layers.1.input_layernorm.weight": torch.ones(64)})), "1 tensors that mtpress does not"
    ),
    "another hidden size": (lambda b: set_text(b, hidden_size=128), "its hidden_size is 128, the checkpoint's 64"),
    "another family": (lambda b: (b / "config.json").write_text('{"model_type": "llama"}'), "llama"),
    "another head": (lambda b: change(b, wide), r"mtp.fc.weight is \[64, 192\], the checkpoint's body calls for \[64, 128\]"),
    "torn": (lambda b: (b / SINGLE_NAME).write_bytes(b"torn"), "torn"),
    "no weights": (lambda b: (b / SINGLE_NAME).unlink(), "no .*safetensors file"),
    "no directory": (shutil.rmtree, "no such directory"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", list(REFUSALS))
def test_bases_that_are_refused(trouble: str, base: Path, tmp_path: Path) -> None:
    damage, said = REFUSALS[trouble]
    source, other = build(tmp_path / "source", "modelopt", missing, "shards"), tmp_path / "base"
    shutil.copytree(base, other)
    damage(other)
    before = digests(source)
    with pytest.raises(InputError, match=said):
        graft(source, tmp_path / "out", other, silent=True)
    assert digests(source) == before and not list(tmp_path.glob("out*"))


def test_checkpoints_that_are_refused(base: Path, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "modelopt", missing, "single")
    with pytest.raises(InputError, match="is the checkpoint itself"):
        graft(base, tmp_path / "out", f"{base.parent}/../{base.parent.name}/{base.name}", silent=True)
    with pytest.raises(InputError, match="exists already"):
        graft(source, base, base, silent=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(InputError, match="declares AWQ; mtpress can say what stays in BF16"):
        graft(source, tmp_path / "out", base, silent=True)
    (source / "config.json").write_text(json.dumps(config))
    odd = shutil.copytree(source, tmp_path / "odd")
    change(odd, lambda tensors: tensors.update({f"layers.{i}.experts.weight": torch.zeros(1) for i in range(1001)}))
    with pytest.raises(InputError, match=r"1001 tensors belong to no known component \(layers.0.experts.weight, …\)"):
        graft(odd, tmp_path / "out", base, silent=True)
    shutil.rmtree(odd)
    set_text(source, num_key_value_heads=2)
    with pytest.raises(InputError, match="the head is of another model"):
        graft(source, tmp_path / "out", base, silent=True)
    change(source, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers." in name])
    with pytest.raises(InputError, match="no decoder layers"):
        graft(source, tmp_path / "out", base, silent=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = build(tmp_path / "source", "compressed-tensors", quantized, "shards"), tmp_path / "out"
    assert main(["graft", str(source), str(out), "--from", str(base), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err == ""
    assert found["next"] == f"mtpress check {out} --base {base}"
    assert found.keys() == {*GraftResult.__dataclass_fields__, "next"}
    record = json.loads((out / "mtpress.json").read_text())
    assert (record["stage"], record["draft_head"], record["base"]["name"]) == ("graft", "the base's, bit for bit", "base")
    assert record["base"]["identity"] == Checkpoint.open(base).identity and record["source"]["identity"]
    shutil.rmtree(out)
    assert main(["graft", str(source), str(out), "--from", str(base)]) == 0
    text = capsys.readouterr().out
    assert "removed" in text and "shards linked" in text and f"next: mtpress check {out} --base {base}" in text
    assert len(text.splitlines()) < 40
    assert main(["graft", str(source), str(out), "--from", str(base)]) == 2
    assert capsys.readouterr().err.startswith("mtpress graft: ")
