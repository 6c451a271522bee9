import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mtpress.checkpoint import direct_io as disk
from mtpress.checkpoint import safetensors
from mtpress.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, resolve
from mtpress.checkpoint.direct_io import read_pieces
from mtpress.checkpoint.json_files import read_json
from mtpress.checkpoint.safetensors import read_rows, read_shard, read_tensor
from mtpress.errors import InputError

TENSORS = {
    "bf16": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "f16": torch.rand(5, generator=torch.Generator().manual_seed(0)).half(),
    "f32": torch.tensor(1.5),
    "f64": torch.tensor([1.0, -2.0], dtype=torch.float64),
    "f8": torch.tensor([[0.5, -448.0]]).to(torch.float8_e4m3fn),
    "u8": torch.arange(256, dtype=torch.uint8),
    "i8": torch.tensor([-3, 3], dtype=torch.int8),
    "i32": torch.tensor([[[1 << 30]]], dtype=torch.int32),
    "i64": torch.tensor([-(1 << 60)]),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 4, dtype=torch.bfloat16),
}
ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def shard_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file whose header is any JSON (or raw bytes), and whose length may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_checkpoint(path: Path, weight_map: dict[str, str]) -> Path:
    """A checkpoint of one-byte tensors, sharded as its index says."""
    path.mkdir()
    for file in sorted(set(weight_map.values())):
        save_file({n: torch.tensor([i]).byte() for i, (n, f) in enumerate(weight_map.items()) if f == file}, path / file)
    (path / "config.json").write_text('{"model_type": "qwen3_5"}')
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.fixture
def single(tmp_path: Path) -> Checkpoint:
    save_file(TENSORS, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5", "text_config": {"hidden_size": 4}}')
    return Checkpoint.open(tmp_path)


def test_every_dtype_is_read_as_safetensors_wrote_it(single: Checkpoint) -> None:
    assert set(single.tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert same_bits(single.read(name), tensor), name
        assert (
            b"".join(bytes(piece) for piece in read_pieces(single.tensors[name])) == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    assert single.shards[0].metadata == {"format": "pt"}
    assert single.num_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert single.text_config == {"hidden_size": 4}


def test_what_is_read_owns_its_memory(single: Checkpoint) -> None:
    first, second = single.read("u8"), single.read("u8")
    first.zero_()
    assert torch.equal(second, TENSORS["u8"])


def test_rows_of_a_matrix(single: Checkpoint) -> None:
    rows = torch.tensor([2, 0, 2, 1])
    assert torch.equal(read_rows(single.tensors["bf16"], rows), TENSORS["bf16"][rows])
    with pytest.raises(InputError, match="token id 3 is outside bf16 with 3 rows"):
        read_rows(single.tensors["bf16"], torch.tensor([0, 3]))


def test_pieces_are_small(single: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (safetensors, disk):
        monkeypatch.setattr(module, "PIECE_BYTES", 100)
    assert [len(piece) for piece in read_pieces(single.tensors["u8"])] == [100, 100, 56]
    assert torch.equal(single.read("u8"), TENSORS["u8"])


def test_a_file_that_shrinks_while_it_is_read(single: Checkpoint) -> None:
    os.truncate(single.path / SINGLE_NAME, single.tensors["u8"].offset + 10)
    with pytest.raises(InputError, match="ends inside tensor u8"):
        single.read("u8")
    with pytest.raises(InputError, match="ends inside tensor u8"):
        list(read_pieces(single.tensors["u8"]))
    (single.path / SINGLE_NAME).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_tensor(single.tensors["f32"])


def test_shards_and_index(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"b": "2.safetensors", "a": "1.safetensors", "c": "1.safetensors"})
    (path / "notes.txt").touch()
    (path / "stray.safetensors").touch()
    opened = Checkpoint.open(path)
    assert [shard.path.name for shard in opened.shards] == ["1.safetensors", "2.safetensors"]
    assert {name: int(opened.read(name)) for name in "abc"} == {"b": 0, "a": 1, "c": 2}
    assert not opened.unindexed
    assert [file.name for file in opened.other_files()] == ["config.json", "notes.txt"]
    assert opened.json_file("nothing.json") is None


def test_a_stored_tensor_that_the_index_does_not_name(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"a": "1.safetensors", "b": "1.safetensors"})
    (path / INDEX_NAME).write_text('{"weight_map": {"a": "1.safetensors"}}')
    opened = Checkpoint.open(path)
    assert list(opened.tensors) == ["a"]
    assert list(opened.unindexed) == ["b"]


def test_identity_names_config_and_layout_but_not_the_place(tmp_path: Path) -> None:
    identities = {}
    for name, weight_map in {"one": {"a": "1.safetensors"}, "same": {"a": "1.safetensors"}, "other": {"b": "1.safetensors"}}.items():
        identities[name] = Checkpoint.open(write_checkpoint(tmp_path / name, weight_map)).identity
    (tmp_path / "same/config.json").write_text('{"model_type": "qwen3_5_text"}')
    assert identities["one"] == identities["same"] != identities["other"]
    assert Checkpoint.open(tmp_path / "same").identity != identities["one"]


BROKEN_SHARDS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too few for a header"),
    "seven bytes": (b"1234567", "too few for a header"),
    "header cut": (shard_bytes({"a": ENTRY}, length=None)[:20], "claims"),
    "header claim of 2^63": (shard_bytes({"a": ENTRY}, b"1234", length=1 << 63), "claims 9223372036854775808 bytes"),
    "header claim one too many": (shard_bytes(b"{}", length=3), "claims 3 bytes"),
    "no JSON": (shard_bytes(b"{'a': 1}"), "not JSON"),
    "no UTF-8": (shard_bytes(b'{"\xff": {}}'), "not JSON"),
    "nested without end": (shard_bytes(b"[" * 100_000), "not JSON"),
    "a list": (shard_bytes([1]), "not a JSON object"),
    "a name with half a pair": (shard_bytes(b'{"\\ud800": %b}' % json.dumps(ENTRY).encode(), b"1234"), "not text"),
    "a name that is no UTF-8": (shard_bytes(b'{"\xed\xa0\x80": %b}' % json.dumps(ENTRY).encode(), b"1234"), "not text"),
    "a name twice": (shard_bytes(b'{"a": %b, "a": %b}' % ((json.dumps(ENTRY).encode(),) * 2), b"1234"), "'a' stands twice"),
    "a key of an entry twice": (
        shard_bytes(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [0], "data_offsets": [0, 0]}}'),
        "stands twice",
    ),
    "metadata of numbers": (shard_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (shard_bytes({"__metadata__": ["a"]}), "__metadata__"),
    "entry a number": (shard_bytes({"a": 3}), "its entry is not"),
    "entry without offsets": (shard_bytes({"a": {"dtype": "U8", "shape": [0]}}), "its entry is not"),
    "entry with more keys": (shard_bytes({"a": {**ENTRY, "x": 1}}, b"1234"), "its entry is not"),
    "dtype unknown": (shard_bytes({"a": {**ENTRY, "dtype": "F3"}}, b"1234"), "unknown dtype 'F3'"),
    "dtype a list": (shard_bytes({"a": {**ENTRY, "dtype": ["U8"]}}, b"1234"), "unknown dtype"),
    "dtype too wide": (shard_bytes({"a": {**ENTRY, "dtype": "F32"}}, b"1234"), "needs 16 bytes, has 4"),
    "shape negative": (shard_bytes({"a": {**ENTRY, "shape": [-4]}}, b"1234"), "not a list of sizes"),
    "shape a fraction": (shard_bytes({"a": {**ENTRY, "shape": [4.0]}}, b"1234"), "not a list of sizes"),
    "shape a truth": (shard_bytes({"a": {**ENTRY, "shape": [4, True]}}, b"1234"), "not a list of sizes"),
    "shape beyond all memory": (shard_bytes({"a": {**ENTRY, "shape": [1 << 47] * 16}}, b"1234"), "needs"),
    "shape beyond any disk": (shard_bytes({"a": {**ENTRY, "shape": [1 << 61]}}, b"1234"), "not a list of sizes"),
    "shape of 17 dimensions": (shard_bytes({"a": {**ENTRY, "shape": [1] * 16 + [4]}}, b"1234"), "not a list of sizes"),
    "offsets descend": (shard_bytes({"a": {**ENTRY, "data_offsets": [4, 0]}}, b"1234"), "not a pair of ascending"),
    "offsets three": (shard_bytes({"a": {**ENTRY, "data_offsets": [0, 4, 8]}}, b"1234"), "not a pair of ascending"),
    "offsets negative": (shard_bytes({"a": {**ENTRY, "data_offsets": [-4, 0]}}, b"1234"), "not a pair of ascending"),
    "offsets overlap": (shard_bytes({"a": ENTRY, "b": {**ENTRY, "data_offsets": [2, 6]}}, b"123456"), "starts at byte"),
    "two tensors at one place": (shard_bytes({"a": ENTRY, "b": ENTRY}, b"1234"), "starts at byte"),
    "a gap": (shard_bytes({"a": ENTRY, "b": {**ENTRY, "data_offsets": [5, 9]}}, b"123456789"), "starts at byte"),
    "data not at the start": (shard_bytes({"a": {**ENTRY, "data_offsets": [1, 5]}}, b"12345"), "starts at byte"),
    "data cut": (shard_bytes({"a": ENTRY}, b"123"), "its tensors end at byte"),
    "data with a tail": (shard_bytes({"a": ENTRY}, b"12345"), "its tensors end at byte"),
}


@pytest.mark.parametrize("trouble", list(BROKEN_SHARDS))
def test_a_header_that_lies_is_refused(trouble: str, tmp_path: Path) -> None:
    content, word = BROKEN_SHARDS[trouble]
    path = tmp_path / SINGLE_NAME
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(word)) as raised:
        read_shard(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert len(str(raised.value)) < 700


def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_NAME
    path.write_bytes(struct.pack("<Q", 1 << 37))
    os.truncate(path, 1 << 38)  # a hole: the claim is within the file, reading it would take 137 GB
    with pytest.raises(InputError, match="claims 137438953472 bytes"):
        read_shard(path)


def test_the_header_may_be_padded_and_in_any_order(tmp_path: Path) -> None:
    header = {"b": {**ENTRY, "data_offsets": [4, 8]}, "a": ENTRY, "zero": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [4, 4]}}
    (tmp_path / "s").write_bytes(shard_bytes(json.dumps(header).encode() + b"   ", b"aaaabbbb"))
    shard = read_shard(tmp_path / "s")
    assert [info.name for info in shard.tensors] == ["a", "zero", "b"]
    assert read_tensor(shard.tensors[2]).tolist() == list(b"bbbb")
    assert shard.metadata == {}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / SINGLE_NAME


@settings(max_examples=300, deadline=None, derandomize=True)
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3)), min_size=1, max_size=4), cut=st.integers(0, 40))
def test_no_damage_escapes_as_anything_but_an_input_error(scratch: Path, changes: list[tuple[int, bytes]], cut: int) -> None:
    raw = bytearray(save({"a": torch.zeros(4), "b.weight": torch.ones(2, 3).byte()}, metadata={"format": "pt"}))
    for position, content in changes:
        raw[position % len(raw) : position % len(raw) + len(content)] = content
    scratch.write_bytes(raw[: len(raw) - cut])
    try:
        shard = read_shard(scratch)
    except InputError:
        return
    assert sum(info.num_bytes for info in shard.tensors) < len(raw)
    assert all(read_tensor(info).shape == info.shape for info in shard.tensors if info.dtype not in ("F8_E8M0", "U16", "U32", "U64"))


def set_map(**entries: str) -> Callable[[Path], object]:
    return lambda path: (path / INDEX_NAME).write_text(json.dumps({"weight_map": entries}))


BROKEN_DIRECTORIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config too large": (lambda d: os.truncate(d / "config.json", 26_000_000), "larger than 25 MB"),
    "config a directory": (lambda d: (d / "config.json").unlink() or (d / "config.json").mkdir(), "no config.json"),
    "no index and no single file": (lambda d: (d / INDEX_NAME).unlink(), "neither"),
    "index a directory": (lambda d: (d / INDEX_NAME).unlink() or (d / INDEX_NAME).mkdir(), "cannot be read"),
    "index empty": (lambda d: (d / INDEX_NAME).write_text(""), "not valid JSON"),
    "index a list": (lambda d: (d / INDEX_NAME).write_text("[]"), "must hold a JSON object"),
    "map empty": (set_map(), "has no weight_map"),
    "map a list": (lambda d: (d / INDEX_NAME).write_text('{"weight_map": ["a"]}'), "has no weight_map"),
    "map to numbers": (lambda d: (d / INDEX_NAME).write_text('{"weight_map": {"a": 1}}'), "has no weight_map"),
    "map with a name twice": (lambda d: (d / INDEX_NAME).write_text('{"weight_map": {"a": "1", "a": "2"}}'), "stands twice"),
    "file outside": (set_map(a="../1.safetensors"), "outside the directory"),
    "file in a subdirectory": (set_map(a="sub/1.safetensors"), "in a folder below"),
    "file by absolute path": (set_map(a="/tmp/1.safetensors"), "outside the directory"),
    "file without a name": (set_map(a=""), "outside the directory"),
    "file the parent": (set_map(a=".."), "outside the directory"),
    "file a pickle": (set_map(a="pytorch_model.bin"), "not a safetensors file"),
    "shard missing": (lambda d: (d / "2.safetensors").unlink(), "2.safetensors is in the index but not on disk"),
    "shard a directory": (lambda d: (d / "2.safetensors").unlink() or (d / "2.safetensors").mkdir(), "not on disk"),
    "tensor not stored": (set_map(a="1.safetensors", ghost="2.safetensors"), "says that ghost is in 2.safetensors"),
    "tensor in the other file": (set_map(a="2.safetensors", b="1.safetensors"), "says that a is in 2.safetensors"),
    "tensor in two files": (
        lambda d: save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, d / "2.safetensors"),
        "is stored in 1.safetensors",
    ),
}


@pytest.mark.parametrize("trouble", list(BROKEN_DIRECTORIES))
def test_a_directory_that_is_no_checkpoint_is_refused(trouble: str, tmp_path: Path) -> None:
    damage, word = BROKEN_DIRECTORIES[trouble]
    path = write_checkpoint(tmp_path / "c", {"a": "1.safetensors", "b": "2.safetensors"})
    damage(path)
    with pytest.raises(InputError, match=re.escape(word)) as raised:
        Checkpoint.open(path)
    assert str(path) in str(raised.value)


def test_text_config_must_be_an_object(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"a": "1.safetensors"})
    (path / "config.json").write_text('{"text_config": 3}')
    with pytest.raises(InputError, match="text_config is not an object"):
        _ = Checkpoint.open(path).text_config


def test_json_without_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": {"b": [1, {"c": 2}]}}')
    assert read_json(path) == {"a": {"b": [1, {"c": 2}]}}
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(InputError, match="'b' stands twice"):
        read_json(path)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "~/nowhere", "a/b/c", "org/name/"])
def test_what_is_no_directory_and_no_hub_id(name: str) -> None:
    with pytest.raises(InputError, match="no such directory"):
        resolve(name)


def test_a_hub_id_is_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: {"org/model": str(tmp_path)}[name])
    assert resolve("org/model") == tmp_path


def test_a_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> str:
        raise OSError("no connection\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError, match=r"org/model: neither a directory nor .* \(no connection\)"):
        resolve("org/model")


def test_what_is_stored_counts_whatever_the_index_says(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"})
    for content in (None, "not json", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"ghost": "z.safetensors", "a": "y.safetensors"}}'):
        (path / INDEX_NAME).unlink() if content is None else (path / INDEX_NAME).write_text(content)
        opened = Checkpoint.open_stored(path)
        assert {name: info.file.name for name, info in opened.tensors.items()} == {
            n: f"{f}.safetensors" for n, f in zip("abc", "xxy", strict=True)
        }
        assert not opened.unindexed and len(opened.shards) == 2
        assert (opened.index is None) == (content is None or not content.startswith("{"))


def test_a_tensor_stored_twice_is_the_index_s_to_decide(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "c", {"a": "x.safetensors", "b": "y.safetensors"})
    save_file({"a": torch.ones(2)}, path / "z.safetensors")
    assert Checkpoint.open_stored(path).tensors["a"].file.name == "x.safetensors"
    (path / INDEX_NAME).write_text('{"weight_map": {"a": "z.safetensors"}}')
    opened = Checkpoint.open_stored(path)
    assert opened.tensors["a"].file.name == "z.safetensors" and len(opened.shards) == 3
    for content in ("{}", '{"weight_map": {"a": "y.safetensors"}}'):
        (path / INDEX_NAME).write_text(content)
        with pytest.raises(InputError, match=r"a is stored in x.safetensors and in z.safetensors, and no index says which counts"):
            Checkpoint.open_stored(path)


def test_open_stored_refuses_what_holds_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        Checkpoint.open_stored(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no \*.safetensors file"):
        Checkpoint.open_stored(tmp_path)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="torn"):
        Checkpoint.open_stored(tmp_path)
