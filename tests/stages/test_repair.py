"""repair as a command and as a function: exit codes, JSON, record, dry run, what it reads and links, what it refuses."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from breaks import a_template_that_trims_answers
from checkpoints import PREFIX, Edit
from mtpress.checkpoint import direct_io as disk
from mtpress.checkpoint import safetensors
from mtpress.checkpoint.checkpoint import INDEX_NAME, Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.cli import main
from mtpress.errors import InputError
from mtpress.stages.check import check
from mtpress.stages.repair import repair

VLM = "nvfp4-mtp-vlm"


@pytest.fixture
def edit(small_nvfp4: dict[str, Path], tmp_path: Path) -> Edit:
    return Edit(Path(shutil.copytree(small_nvfp4[VLM], tmp_path / "broken")))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["repair", *map(str, arguments), "--json"])
    shown = capsys.readouterr()
    assert shown.err == "" or code == 2
    return code, json.loads(shown.out)


def drop_head(edit: Edit) -> None:
    for name in [n for n in edit.tensors if n.startswith("mtp.")]:
        del edit.tensors[name]


def test_nothing_to_repair(small_nvfp4: dict[str, Path], out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, small_nvfp4[VLM], out)
    assert (code, result["written"], result["fixed"], result["left"], result["files"]) == (0, False, [], [], None)
    assert not out.exists()
    assert main(["repair", str(small_nvfp4[VLM]), str(out)]) == 0
    assert "nothing to repair" in capsys.readouterr().out


def test_a_repaired_checkpoint(edit: Edit, out: Path, small_bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_head(edit)
    edit.change("tokenizer_config.json", backend="tokenizers")
    edit.save()
    code, result = run(capsys, edit.path, out, "--base", small_bf16)
    assert (code, result["sound"], result["written"], result["left"], result["compared_with_base"]) == (0, True, True, [], True)
    assert {entry["finding"]["id"] for entry in result["fixed"]} == {"mtp-missing", "tokenizer-backend"}
    assert result["files"]["linked"] == ["model.safetensors"]
    assert list(result["files"]["added"]) == ["model-mtp.safetensors"]
    assert check(out, base=small_bf16, silent=True).findings == ()
    record = json.loads((out / "mtpress.json").read_text())
    assert record["stage"] == "repair"
    assert {finding["id"] for finding in record["findings"]} == {"mtp-missing", "tokenizer-backend"}
    assert {entry["id"] for entry in record["repairs"]} == {"mtp-missing", "tokenizer-backend"}
    assert (record["left"], record["base"]["name"], record["source"]["name"]) == ([], "bf16", "broken")
    assert record["source"]["made_from"]["stage"] == "quantize"


def test_the_record_holds_the_hashes_of_what_was_linked_and_written(small_nvfp4: dict[str, Path], out: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(small_nvfp4[VLM], tmp_path / "broken"))
    (broken / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    assert repair(broken, out, silent=True).sound
    result = check(out, hashes=True, silent=True)
    assert result.findings == ()
    assert result.num_files_hashed == 9


def test_errors_that_are_left_are_exit_code_1(edit: Edit, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_head(edit)
    edit.change("tokenizer_config.json", backend="tokenizers")
    edit.save()
    code, result = run(capsys, edit.path, out)
    assert (code, result["sound"], result["written"]) == (1, False, True)
    assert [entry["finding"]["id"] for entry in result["left"]] == ["mtp-missing"]
    assert result["left"][0]["left"][0]["takes"] == "run it again with --base SRC"
    assert "backend" not in json.loads((out / "tokenizer_config.json").read_text())
    shutil.rmtree(out)
    assert main(["repair", str(edit.path), str(out)]) == 1
    assert "NOT SOUND: 1 finding mended, left: 1 error" in capsys.readouterr().out.splitlines()[-1]


def test_where_nothing_can_be_mended_nothing_is_written(edit: Edit, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_head(edit)
    edit.save()
    code, result = run(capsys, edit.path, out)
    assert (code, result["written"]) == (1, False)
    assert not out.exists()


def test_a_template_can_be_kept(edit: Edit, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = edit.path / "chat_template.jinja"
    a_template_that_trims_answers(edit)
    theirs = template.read_text()
    edit.change("tokenizer_config.json", backend="tokenizers")
    edit.save()
    _, result = run(capsys, edit.path, out, "--keep-template")
    assert (out / "chat_template.jinja").read_text() == theirs
    assert [entry["finding"]["id"] for entry in result["fixed"]] == ["tokenizer-backend"]
    told = {entry["finding"]["id"]: entry["left"][0]["why"] for entry in result["left"]}
    assert told["template-behaviour"] == "--keep-template"
    shutil.rmtree(out)
    _, result = run(capsys, edit.path, out)
    assert (result["sound"], result["left"]) == (True, [])
    assert (out / "chat_template.jinja").read_text() != theirs


class Reads:
    """Bytes of tensors read by either of the package's readers."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.num_bytes = 0
        read, pieces = safetensors.read_bytes, disk.read_range

        def read_bytes(info: TensorInfo, into: memoryview) -> None:
            self.num_bytes += info.num_bytes
            read(info, into)

        def read_range(file: int, into: memoryview, start: int, end: int, info: TensorInfo) -> None:
            self.num_bytes += end - start
            pieces(file, into, start, end, info)

        for module in ("mtpress.checkpoint.safetensors", "mtpress.quant_config.view"):
            patch.setattr(f"{module}.read_bytes", read_bytes)
        patch.setattr("mtpress.checkpoint.direct_io.read_range", read_range)


def break_metadata(edit: Edit) -> None:
    edit.ignore([*(n for n in edit.quantization["ignore"] if not n.startswith("mtp")), "model.mtp*"])
    edit.config["torch_dtype"] = edit.text.pop("dtype")
    edit.change("tokenizer_config.json", backend="tokenizers")
    edit.later((edit.path / INDEX_NAME).unlink)
    edit.later((edit.path / "preprocessor_config.json").unlink)


def test_metadata_alone_reads_no_weight(edit: Edit, out: Path, small_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only float32 scalars, which the rules go by; and the shard is the source's own file."""
    break_metadata(edit)
    edit.save()
    scalars = sum(tensor.nbytes for tensor in edit.tensors.values() if tensor.numel() == 1)
    reads = Reads(monkeypatch)
    result = repair(edit.path, out, small_bf16, comparing=False, silent=True)
    assert result.sound
    assert {outcome.finding.id for outcome in result.fixed} >= {"mtp-not-ignored", "torch-dtype", "tokenizer-backend", "processor-missing"}
    rounds = reads.num_bytes / scalars
    assert 0 < rounds < 20
    assert rounds == int(rounds)
    assert (out / "model.safetensors").samefile(edit.path / "model.safetensors")
    assert result.plan is not None
    assert (result.plan.rewritten, result.plan.added) == ({}, {})


def test_a_dry_run_reads_and_writes_nothing(edit: Edit, out: Path, small_bf16: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_metadata(edit)
    drop_head(edit)
    edit.tensors["lm_head.weight"] = edit.tensors["lm_head.weight"].float()
    edit.save()
    scalars = sum(tensor.nbytes for tensor in edit.tensors.values() if tensor.numel() == 1)
    reads = Reads(monkeypatch)
    before = {path.name: path.stat().st_mtime_ns for path in edit.path.iterdir()}
    result = repair(edit.path, out, small_bf16, dry_run=True)
    assert reads.num_bytes % scalars == 0
    assert (result.sound, result.written, result.dry_run) == (True, False, True)
    assert result.plan is not None
    assert "mtp.fc.weight" in result.plan.added["model-mtp.safetensors"]
    assert {path.name: path.stat().st_mtime_ns for path in edit.path.iterdir()} == before
    assert [path.name for path in edit.path.parent.iterdir()] == ["broken"]


def test_what_is_refused_is_one_line(edit: Edit, out: Path, small_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_head(edit)
    edit.save()
    (tmp_path / "there").mkdir()
    cases: dict[str, list[object]] = {
        "exists already": [edit.path, tmp_path / "there"],
        "no such directory": [tmp_path / "nowhere", out],
        "--no-compare": [edit.path, out, "--no-compare"],
        "lies inside": [edit.path, edit.path / "out", "--base", small_bf16],
    }
    for word, arguments in cases.items():
        assert main(["repair", *map(str, arguments)]) == 2
        shown = capsys.readouterr()
        assert word in shown.err
        assert shown.err.count("\n") == 1
        assert not out.exists()


@pytest.mark.parametrize("damage", ["index", "config", "lying index", "missing shard", "family"])
def test_what_check_cannot_open(damage: str, edit: Edit, out: Path, small_bf16: Path) -> None:
    edit.save()
    path = edit.path
    if damage == "index":
        (path / INDEX_NAME).write_text("{")
    elif damage == "config":
        (path / "config.json").write_text("{")
    elif damage == "lying index":
        index = edit.read(INDEX_NAME)
        index["weight_map"]["x"] = "model.safetensors"
        edit.write(INDEX_NAME, index)
    elif damage == "missing shard":
        index = edit.read(INDEX_NAME)
        index["weight_map"]["x"] = "model-00002-of-00002.safetensors"
        edit.write(INDEX_NAME, index)
    else:
        edit.change("config.json", model_type="llama")
    from_base = damage in ("config", "family")
    if from_base:
        with pytest.raises(InputError, match="--base SRC"):
            repair(path, out, silent=True)
    result = repair(path, out, small_bf16 if from_base else None, silent=True)
    assert result.sound, result.findings
    assert result.outcomes[0].finding.id == "unreadable"
    made = check(out, base=small_bf16, silent=True)
    assert made.findings == ()
    assert made.num_quantized == 25


def test_a_torn_shard_is_refused(edit: Edit, out: Path) -> None:
    edit.save()
    shard = edit.path / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(InputError, match="repair cannot bring back what is in it"):
        repair(edit.path, out, silent=True)


def test_the_same_tensor_in_two_shards(edit: Edit, out: Path) -> None:
    """The index decides; the other one leaves, and its file with it."""
    edit.save()
    shutil.copy(edit.path / "model.safetensors", edit.path / "copy.safetensors")
    result = repair(edit.path, out, silent=True)
    assert result.sound
    assert not (out / "copy.safetensors").exists()
    assert result.left_out == ("copy.safetensors: holds all of its 167 tensors in the indexed files too",)
    (edit.path / INDEX_NAME).unlink()
    with pytest.raises(InputError, match="no index says which counts"):
        repair(edit.path, out.with_name("again"), silent=True)


def test_whole_layers_are_not_dropped(edit: Edit, out: Path, small_bf16: Path) -> None:
    """A config that says three layers of four is wrong; the fourth layer is not."""
    edit.text["num_hidden_layers"] = 3
    edit.save()
    result = repair(edit.path, out, silent=True)
    assert not result.sound
    assert any("layer 3 is whole" in left.why for outcome in result.left for left in outcome.left)
    assert not out.exists() or f"{PREFIX}layers.3.mlp.down_proj.weight" in json.loads((out / INDEX_NAME).read_text())["weight_map"]
    shutil.rmtree(out, ignore_errors=True)
    assert repair(edit.path, out, small_bf16, silent=True).sound
    assert check(out, base=small_bf16, silent=True).findings == ()


def test_a_text_only_form_over_vl_names(edit: Edit, out: Path, small_bf16: Path) -> None:
    """architectures, model_type and config rewritten to text only, and the names of the body with them."""
    quantization = edit.quantization
    edit.config = edit.text | {"architectures": ["Qwen3_5ForCausalLM"], "quantization_config": quantization}
    for name in [n for n in edit.tensors if n.startswith(PREFIX)]:
        edit.tensors[name.replace("language_model.", "", 1)] = edit.tensors.pop(name)
    edit.save()
    result = repair(edit.path, out, small_bf16, silent=True)
    assert result.sound, result.findings
    assert check(out, base=small_bf16, silent=True).findings == ()


def test_norms_and_scales_that_differ_are_told(edit: Edit, out: Path, small_bf16: Path) -> None:
    """A norm that differs may be folded into the matrices behind it; a base's would break both."""
    name = f"{PREFIX}layers.0.input_layernorm.weight"
    edit.tensors[name] = edit.tensors[name] * 2
    for linear in ("in_proj_qkv", "in_proj_z"):
        scale = f"{PREFIX}layers.0.linear_attn.{linear}.weight_scale_2"
        edit.tensors[scale] = edit.tensors[scale] / 2
    edit.save()
    result = repair(edit.path, out, small_bf16, silent=True)
    assert result.relation is not None
    assert (result.relation.kind, result.written, result.sound) == ("source", False, False)
    assert {outcome.finding.id for outcome in result.left} == {"kept-differs", "error-large"}
    assert all("--base-is source" in outcome.left[0].takes for outcome in result.left)
    assert repair(edit.path, out, small_bf16, base_is="source", silent=True).sound
    assert check(out, base=small_bf16, silent=True).findings == ()


def test_a_trained_tower_under_another_name_keeps_its_weights(small_bf16: Path, tmp_path: Path) -> None:
    edit = Edit(Path(shutil.copytree(small_bf16, tmp_path / "trained")))
    trained = {name: tensor * 1.01 for name, tensor in edit.tensors.items() if name.startswith("model.visual.")}
    for name, tensor in trained.items():
        del edit.tensors[name]
        edit.tensors[name.replace("model.", PREFIX, 1)] = tensor
    edit.save()
    result = repair(edit.path, tmp_path / "out", small_bf16, silent=True)
    assert result.sound
    assert [outcome.finding.id for outcome in result.fixed] == ["names-wrapped"]
    made = Checkpoint.open(tmp_path / "out")
    assert all(made.read(name).equal(tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("bare", [False, True])
def test_a_head_alone_is_for_graft(bare: bool, small_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit = Edit(Path(shutil.copytree(small_bf16, tmp_path / "head")))
    head = {name: tensor for name, tensor in edit.tensors.items() if name.startswith("mtp.")}
    edit.tensors = {name.removeprefix("mtp.") if bare else name: tensor for name, tensor in head.items()}
    edit.save()
    assert [finding.id for finding in check(edit.path, silent=True).findings] == ["head-alone"]
    with pytest.raises(InputError, match="a draft head and no body; mtpress graft CKPT OUT --from"):
        repair(edit.path, tmp_path / "out", silent=True)
    without = Edit(Path(shutil.copytree(small_bf16, tmp_path / "without")))
    drop_head(without)
    without.save()
    (edit.path / "config.json").unlink()
    assert main(["graft", str(without.path), str(tmp_path / "grafted"), "--from", str(edit.path)]) == 0
    made = Checkpoint.open(tmp_path / "grafted")
    assert all(made.read(name).equal(tensor) for name, tensor in head.items())
    assert f"next: mtpress check {tmp_path / 'grafted'}\n" in capsys.readouterr().out


def test_another_save_beside_the_index_is_left_out(small_bf16: Path, out: Path, tmp_path: Path) -> None:
    edit = Edit(Path(shutil.copytree(small_bf16, tmp_path / "two-saves")))
    single = edit.path / "model.safetensors"
    single.rename(edit.path / "kept.safetensors")
    names = {info.name: "kept.safetensors" for info in safetensors.read_shard(edit.path / "kept.safetensors").tensors}
    size = sum(info.num_bytes for info in safetensors.read_shard(edit.path / "kept.safetensors").tensors)
    (edit.path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": names}))
    shutil.copy(edit.path / "kept.safetensors", single)
    found = check(edit.path, silent=True).findings
    assert [finding.id for finding in found] == ["shard-unindexed"]
    assert "transformers model.safetensors in its place" in found[0].message
    assert repair(edit.path, out, silent=True).sound
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["kept.safetensors"]
