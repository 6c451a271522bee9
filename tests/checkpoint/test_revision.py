"""Revisions: what does not change is the source's own file, what changes is exactly what was asked for, and the source stays."""

import errno
import hashlib
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import write_small
from mtpress.checkpoint import revision
from mtpress.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from mtpress.checkpoint.revision import Revision
from mtpress.checkpoint.shard_writer import OutputTensor
from mtpress.cli import main
from mtpress.errors import InputError, ResourceError
from mtpress.models.qwen3_5.names import MTP_PREFIX, MTP_TENSORS

FIRST, SECOND, THIRD = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
NORM = "model.language_model.norm.weight"


def split(path: Path) -> Path:
    """The small checkpoint in three shards: the draft head is the second one's."""
    write_small(path)
    tensors = load_file(path / SINGLE_NAME)
    (path / SINGLE_NAME).unlink()
    body = [name for name in tensors if not name.startswith("mtp.")]
    files = {FIRST: body[:40], SECOND: [name for name in tensors if name.startswith("mtp.")], THIRD: body[40:]}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_small(tmp_path_factory.mktemp("base") / "base", seed=7))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return split(tmp_path / "source")


def digests(directory: Path) -> dict[str, str]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def linked(a: Path, b: Path) -> bool:
    return a.stat().st_ino == b.stat().st_ino


def test_only_what_changes_is_written(source: Path, base: Checkpoint, tmp_path: Path) -> None:
    before, out = digests(source), tmp_path / "out"
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    expected = stored(source)
    for name in MTP_TENSORS:
        revised.put(OutputTensor(name, "BF16", base.tensors[name].shape), base.tensors[name])
        expected[name] = base.read(name)
    plan = revised.plan()
    assert (plan.linked, set(plan.rewritten), plan.added, plan.left_out) == ((FIRST, THIRD), {SECOND}, {}, ())
    result = revised.write(out, "graft", {"why": "a test"}, silent=True)
    assert digests(source) == before
    assert linked(out / FIRST, source / FIRST) and linked(out / THIRD, source / THIRD) and not linked(out / SECOND, source / SECOND)
    same(stored(out), expected)
    opened = Checkpoint.open(out)
    assert opened.tensors.keys() == expected.keys() and opened.index is not None
    assert opened.index["metadata"]["total_size"] == opened.num_bytes
    assert result.bytes_written == sum(p.stat().st_size for p in out.iterdir() if p.name not in (FIRST, THIRD, "mtpress.json", INDEX_NAME))
    assert result.bytes_linked == sum((out / file).stat().st_size for file in (FIRST, THIRD))
    record = json.loads((out / "mtpress.json").read_text())
    assert (record["stage"], record["why"], record["source"]["name"]) == ("graft", "a test", "source")
    after = digests(out)
    assert record["output_sha256"] == {name: after[name] for name in after if name not in (FIRST, THIRD, "mtpress.json", INDEX_NAME)}


def test_drop_rename_compute_and_add(source: Path, base: Checkpoint, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", stored(source)
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    revised.rename("mtp.norm.weight", "mtp.other.weight")
    expected["mtp.other.weight"] = expected.pop("mtp.norm.weight")
    revised.drop("mtp.fc.weight")
    del expected["mtp.fc.weight"]
    revised.compute(OutputTensor(NORM, "BF16", (64,)), lambda: torch.full((64,), 3.0, dtype=torch.bfloat16))
    expected[NORM] = torch.full((64,), 3.0, dtype=torch.bfloat16)
    revised.compute(OutputTensor("lm_head.extra", "F32", ()), lambda: torch.tensor(0.5))
    expected["lm_head.extra"] = torch.tensor(0.5)
    revised.put(OutputTensor("mtp.new.weight", "BF16", (64, 128)), base.tensors["mtp.fc.weight"])
    expected["mtp.new.weight"] = base.read("mtp.fc.weight")
    plan = revised.plan()
    assert plan.added == {"model-mtp.safetensors": ("mtp.new.weight",), "model-revised-00001.safetensors": ("lm_head.extra",)}
    assert set(plan.rewritten) == {SECOND, THIRD} and plan.linked == (FIRST,)
    revised.write(out, "repair", {}, silent=True)
    same(stored(out), expected)
    assert Checkpoint.open(out).tensors.keys() == expected.keys()


def test_metadata_only_reads_no_weight(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files beside the weights change; no shard is opened for more than its header, and all of them are links."""
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("hello")
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("no")
    (source / "mtpress.json").write_text(json.dumps({"stage": "quantize", "recipe": {"name": "r"}, "output_sha256": {FIRST: "abc"}}))
    monkeypatch.setattr("mtpress.checkpoint.shard_writer.read_pieces", None)
    monkeypatch.setattr("mtpress.checkpoint.writer.read_pieces", None)
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    revised.write_file("config.json", b'{"model_type": "qwen3_5"}')
    revised.drop_file("generation_config.json")
    result = revised.write(tmp_path / "out", "repair", {}, silent=True)
    assert result.linked == (FIRST, SECOND, THIRD) and not result.rewritten and not result.added
    assert (tmp_path / "out" / "config.json").read_bytes() == b'{"model_type": "qwen3_5"}'
    assert not (tmp_path / "out" / "generation_config.json").exists() and not (tmp_path / "out" / ".cache").exists()
    assert (tmp_path / "out" / "extra" / "notes.txt").read_text() == "hello"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    record = json.loads((tmp_path / "out" / "mtpress.json").read_text())
    assert record["source"]["made_from"] == {"stage": "quantize", "recipe": {"name": "r"}}
    assert record["output_sha256"][FIRST] == "abc" and SECOND not in record["output_sha256"]


def test_a_small_file_is_a_copy_and_a_large_one_a_link(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor that writes OUT/config.json in place must not reach the source."""
    monkeypatch.setattr(revision, "COPIED_BYTES", (source / "tokenizer.json").stat().st_size - 1)
    Revision(Checkpoint.open_stored(source), MTP_PREFIX).write(tmp_path / "out", "repair", {}, silent=True)
    assert not linked(tmp_path / "out" / "config.json", source / "config.json")
    assert linked(tmp_path / "out" / "tokenizer.json", source / "tokenizer.json")


def test_one_file_without_an_index_gets_one(tmp_path: Path, base: Checkpoint) -> None:
    source = write_small(tmp_path / "source")
    tensors = {name: tensor for name, tensor in load_file(source / SINGLE_NAME).items() if not name.startswith("mtp.")}
    save_file(tensors, source / SINGLE_NAME, metadata={"format": "pt"})
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    for name in MTP_TENSORS:
        revised.put(OutputTensor(name, "BF16", base.tensors[name].shape), base.tensors[name])
    result = revised.write(tmp_path / "out", "graft", {}, silent=True)
    assert (result.linked, result.added) == ((SINGLE_NAME,), {"model-mtp.safetensors": MTP_TENSORS})
    opened = Checkpoint.open(tmp_path / "out")
    assert opened.index is not None and opened.index["weight_map"]["mtp.fc.weight"] == "model-mtp.safetensors"
    same(stored(tmp_path / "out"), tensors | {name: base.read(name) for name in MTP_TENSORS})


def test_a_body_tensor_goes_into_the_one_file(tmp_path: Path) -> None:
    """transformers does not look further than model.safetensors where there is one."""
    source = write_small(tmp_path / "one")
    whole = load_file(source / SINGLE_NAME)
    name = next(name for name in whole if name.endswith("input_layernorm.weight"))
    save_file({n: t for n, t in whole.items() if n != name}, source / SINGLE_NAME, metadata={"format": "pt"})
    changed = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    changed.compute(OutputTensor(name, "BF16", tuple(whole[name].shape)), lambda: whole[name])
    result = changed.write(tmp_path / "out", "repair", {}, silent=True)
    assert (result.linked, tuple(result.rewritten), result.added) == ((), (SINGLE_NAME,), {})
    same(load_file(tmp_path / "out" / SINGLE_NAME), whole)


def test_a_tensor_gives_its_place_to_another(source: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(source)
    name = next(iter(opened.tensors))
    changed = Revision(opened, MTP_PREFIX)
    changed.replace(name, OutputTensor("new", "F32", (1,)), lambda: torch.ones(1))
    result = changed.write(tmp_path / "out", "convert", {}, silent=True)
    assert (tuple(result.rewritten), result.added) == ((opened.tensors[name].file.name,), {})
    found = stored(tmp_path / "out")
    assert name not in found
    assert torch.equal(found["new"], torch.ones(1))


def test_a_shard_of_which_nothing_stays_is_left_out(source: Path, tmp_path: Path) -> None:
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    for name in MTP_TENSORS:
        revised.drop(name)
    assert revised.plan().left_out == (SECOND,)
    revised.write(tmp_path / "out", "repair", {}, silent=True)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == [FIRST, THIRD]
    assert not any(name.startswith("mtp.") for name in Checkpoint.open(tmp_path / "out").tensors)


def test_a_tensor_stored_twice_stays_once(source: Path, tmp_path: Path) -> None:
    expected = stored(source)
    save_file({NORM: torch.zeros(64)}, source / "a-stray.safetensors")
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    assert revised.plan().left_out == ("a-stray.safetensors",)
    revised.write(tmp_path / "out", "repair", {}, silent=True)
    same(stored(tmp_path / "out"), expected)


def test_a_taken_name_is_not_written_over(source: Path, base: Checkpoint, tmp_path: Path) -> None:
    (source / SECOND).rename(source / "model-mtp.safetensors")
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    revised.put(OutputTensor("mtp.new.weight", "BF16", (64, 128)), base.tensors["mtp.fc.weight"])
    assert revised.plan().added == {"model-mtp-00002.safetensors": ("mtp.new.weight",)}


def test_nothing_to_change(source: Path) -> None:
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    revised.write_file("config.json", (source / "config.json").read_bytes())
    assert revised.unchanged
    revised.write_file("config.json", b"{}")
    assert not revised.unchanged


def test_a_link_of_the_hub_s_cache_leads_to_the_file_itself(source: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/main", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        blob = blobs / hashlib.sha256(path.name.encode()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    Revision(Checkpoint.open_stored(snapshot), MTP_PREFIX).write(tmp_path / "out", "repair", {}, silent=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert linked(tmp_path / "out" / FIRST, snapshot / FIRST)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_what_cannot_be_linked_is_copied(number: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    result = revised.write(tmp_path / "out", "repair", {}, silent=True)
    assert (result.unlinked, result.bytes_linked) == (3, 0)
    assert result.bytes_written > sum((source / file).stat().st_size for file in (FIRST, SECOND, THIRD))
    assert digests(tmp_path / "out").items() >= {n: d for n, d in digests(source).items() if n != INDEX_NAME}.items()
    assert not linked(tmp_path / "out" / FIRST, source / FIRST)
    recorded = json.loads((tmp_path / "out" / "mtpress.json").read_text())["output_sha256"]
    assert recorded[FIRST] == digests(source)[FIRST]


@pytest.mark.parametrize("stage", ["repair", "graft", "convert"])
def test_copy_links_nothing(stage: str, source: Path, base: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"graft": ["--from", str(base.path), "--replace-head"], "convert": ["--text-only"]}.get(stage, [])
    if stage == "repair":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"architectures": ["X"]}))
    before = digests(source)
    for name, options in (("linked", more), ("copied", [*more, "--copy"])):
        assert main([stage, str(source), str(tmp_path / name), *options]) == 0, capsys.readouterr().err
    assert (tmp_path / "linked" / FIRST).stat().st_nlink == 2
    assert [path.name for path in (tmp_path / "copied").rglob("*") if path.is_file() and path.stat().st_nlink != 1] == []
    assert json.loads((tmp_path / "copied/mtpress.json").read_text())["hard_links"] == []
    records = {"mtpress.json"}
    made, copies = ({file: sha for file, sha in digests(tmp_path / name).items() if file not in records} for name in ("linked", "copied"))
    assert made == copies and digests(source) == before


def test_a_link_that_fails_otherwise_is_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(ResourceError, match="cannot be written"):
        Revision(Checkpoint.open_stored(source), MTP_PREFIX).write(tmp_path / "out", "repair", {}, silent=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_disk_without_room_is_refused_before_a_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    with pytest.raises(ResourceError, match="are free; free space or choose another disk; the source is untouched"):
        Revision(Checkpoint.open_stored(source), MTP_PREFIX).write(tmp_path / "out", "repair", {}, silent=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("place", ["exists", "source/within"])
def test_places_that_are_refused(place: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "exists").mkdir()
    before = digests(tmp_path)
    with pytest.raises(InputError, match="name a directory"):
        Revision(Checkpoint.open_stored(source), MTP_PREFIX).write(tmp_path / place, "repair", {}, silent=True)
    assert digests(tmp_path) == before


def test_a_failing_computation_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def produce() -> torch.Tensor:
        raise InputError("no")

    before = digests(source)
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    revised.compute(OutputTensor(NORM, "BF16", (64,)), produce)
    with pytest.raises(InputError, match="no"):
        revised.write(tmp_path / "out", "repair", {}, silent=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"] and digests(source) == before


def test_what_a_killed_run_left_is_taken_over_without_touching_the_source(source: Path, tmp_path: Path) -> None:
    """OUT.partial with links to the source's shards, as kill -9 leaves it: they are unlinked, never written into."""
    before, out = digests(source), tmp_path / "out"
    left = out.with_name("out.partial")
    (left / ".mtpress-partial").mkdir(parents=True)
    (left / "extra").mkdir()
    os.link(source / FIRST, left / FIRST)
    os.link(source / SECOND, left / "extra" / SECOND)
    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    revised.drop(next(info.name for shard in revised.source.shards if shard.path.name == FIRST for info in shard.tensors))
    revised.write(out, "repair", {}, silent=True)
    assert digests(source) == before and not left.exists() and not (out / "extra").exists()


def test_a_source_that_changes_is_refused(source: Path, base: Checkpoint, tmp_path: Path) -> None:
    def produce() -> torch.Tensor:
        os.utime(source / FIRST, ns=(1, 1))
        return torch.zeros(64, dtype=torch.bfloat16)

    revised = Revision(Checkpoint.open_stored(source), MTP_PREFIX)
    revised.compute(OutputTensor(NORM, "BF16", (64,)), produce)
    with pytest.raises(InputError, match="changed while it was read"):
        revised.write(tmp_path / "out", "repair", {}, silent=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
