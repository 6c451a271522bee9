import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mtpress.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint
from mtpress.checkpoint.journal import JOURNAL_NAME
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.checkpoint.shard_writer import OutputTensor, disk_failure, shard_header
from mtpress.checkpoint.writer import CheckpointWriter, split_into_shards
from mtpress.errors import InputError, ResourceError

TENSORS = {
    "z.weight": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "a.weight_scale": torch.rand(3, 4, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn),
    "a.weight": torch.arange(24, dtype=torch.uint8).reshape(3, 8),
    "a.weight_scale_2": torch.tensor(0.25),
    "empty": torch.empty(0, 3, dtype=torch.float16),
    "m.qweight": torch.arange(-6, 6, dtype=torch.int32).reshape(2, 6),
    "größe.weight": torch.ones(1, 1, 3, dtype=torch.bfloat16),
}
DTYPES = {
    torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8", torch.float32: "F32", torch.float16: "F16",
    torch.int32: "I32",
}  # fmt: skip
PLANNED = [OutputTensor(name, DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in TENSORS.items()]
SHARDS = {"model-1.safetensors": PLANNED[:3], "model-2.safetensors": PLANNED[3:]}
METADATA = {"format": "pt"}


def write_all(writer: CheckpointWriter) -> None:
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.wait()
    writer.write_file("config.json", b"{}")
    writer.finish()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out"


@pytest.fixture
def written(out: Path) -> Path:
    with CheckpointWriter(out, SHARDS, METADATA) as writer:
        write_all(writer)
    return out


def left(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir()] if out.parent.exists() else []


def test_safetensors_reads_the_same_bits(written: Path) -> None:
    loaded: dict[str, torch.Tensor] = {}
    for file in SHARDS:
        loaded |= load_file(written / file)
        with safe_open(written / file, framework="pt") as opened:
            assert opened.metadata() == METADATA
    assert loaded.keys() == TENSORS.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_our_own_reader_reads_the_same_bits(written: Path) -> None:
    opened = Checkpoint.open(written)
    assert all(same_bits(opened.read(name), tensor) for name, tensor in TENSORS.items())
    assert [info.name for shard in opened.shards for info in shard.tensors] == list(TENSORS)


def test_data_starts_at_a_multiple_of_8() -> None:
    for count in range(1, 9):
        header = shard_header([OutputTensor("a" * count, "U8", (3,))], {})
        assert len(header) % 8 == 0
        assert int.from_bytes(header[:8], "little") == len(header) - 8


def test_hashes_are_those_of_the_files(out: Path) -> None:
    with CheckpointWriter(out, SHARDS, METADATA) as writer:
        write_all(writer)
    assert writer.sha256 == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def test_the_index_names_every_tensor(written: Path) -> None:
    index = json.loads((written / INDEX_NAME).read_text())
    assert index["weight_map"] == {tensor.name: file for file, tensors in SHARDS.items() for tensor in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert left(written) == ["out"]
    assert {path.name for path in written.iterdir()} == {*SHARDS, "config.json", INDEX_NAME}


def test_shards_are_filled_in_order_up_to_the_limit() -> None:
    tensors = [OutputTensor(f"t{size}", "U8", (size,)) for size in (40, 60, 1, 250, 99)]
    assert list(split_into_shards([[t] for t in tensors[:2]], max_bytes=100)) == [SINGLE_NAME]
    split = split_into_shards([[t] for t in tensors], max_bytes=100)
    assert {file: [t.name for t in group] for file, group in split.items()} == {
        "model-00001-of-00004.safetensors": ["t40", "t60"],
        "model-00002-of-00004.safetensors": ["t1"],
        "model-00003-of-00004.safetensors": ["t250"],
        "model-00004-of-00004.safetensors": ["t99"],
    }


@pytest.mark.parametrize("max_queued_bytes", [1, 20, 1 << 30])
def test_pieces_end_to_end_are_the_tensor(max_queued_bytes: int, written: Path, tmp_path: Path) -> None:
    def rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        yield from (tensor[i : i + 1].clone() for i in range(len(tensor))) if tensor.dim() else [tensor]

    with CheckpointWriter(tmp_path / "pieces", SHARDS, METADATA, max_queued_bytes=max_queued_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.write_pieces(name, rows(tensor))
        writer.wait()
        writer.finish()
    for file in SHARDS:
        assert (tmp_path / "pieces" / file).read_bytes() == (written / file).read_bytes()


def test_no_more_waits_in_memory_than_allowed(out: Path) -> None:
    most = 0
    with CheckpointWriter(out, {SINGLE_NAME: [OutputTensor("big", "U8", (1000, 1000))]}, METADATA, max_queued_bytes=5000) as writer:

        def pieces() -> Iterator[torch.Tensor]:
            nonlocal most
            for _ in range(1000):
                most = max(most, writer._queued_bytes)
                yield torch.zeros(1000, dtype=torch.uint8)

        writer.write_pieces("big", pieces())
        writer.wait()
        writer.finish()
    assert most <= 5000
    assert (out / SINGLE_NAME).stat().st_size > 1_000_000


def test_a_copy_is_bit_for_bit(written: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(written)
    with CheckpointWriter(tmp_path / "copy", SHARDS, METADATA) as writer:
        for name, tensor in TENSORS.items():
            if tensor.dtype == torch.bfloat16:
                writer.copy(source.tensors[name])
            else:
                writer.write(name, tensor)
        writer.wait()
        writer.finish()
    for file in SHARDS:
        assert (tmp_path / "copy" / file).read_bytes() == (written / file).read_bytes()


def test_a_copy_whose_source_is_gone(out: Path, tmp_path: Path) -> None:
    gone = TensorInfo("z.weight", "BF16", (7, 5), tmp_path / "gone.safetensors", 8, 70)
    with pytest.raises(InputError, match=r"gone\.safetensors: cannot be read"), CheckpointWriter(out, SHARDS, METADATA) as writer:
        writer.copy(gone)
        for name in list(TENSORS)[1:]:
            writer.write(name, TENSORS[name])
        writer.wait()
    assert left(out) == []


@pytest.mark.parametrize("kind", ["directory", "file", "empty directory"])
def test_an_output_that_exists_is_refused(kind: str, out: Path) -> None:
    out.parent.mkdir()
    if kind == "file":
        out.write_text("precious")
    else:
        out.mkdir()
        if kind == "directory":
            (out / "precious").touch()
    with pytest.raises(InputError, match="exists already"), CheckpointWriter(out, SHARDS, METADATA):
        pytest.fail("entered")
    assert left(out) == ["out"]
    assert kind != "directory" or (out / "precious").exists()


def test_a_partial_directory_of_someone_else_is_left_alone(out: Path) -> None:
    stranger = out.with_name("out.partial")
    stranger.mkdir(parents=True)
    with pytest.raises(InputError, match="was not made by mtpress"), CheckpointWriter(out, SHARDS, METADATA):
        pytest.fail("entered")
    assert stranger.exists()


def test_a_partial_directory_of_an_earlier_run_is_replaced(out: Path) -> None:
    partial = out.with_name("out.partial")
    partial.mkdir(parents=True)
    (partial / JOURNAL_NAME).mkdir()
    (partial / "model-1.safetensors").write_bytes(b"half")
    with CheckpointWriter(out, SHARDS, METADATA) as writer:
        write_all(writer)
    assert left(out) == ["out"]
    assert not (out / JOURNAL_NAME).exists()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), InputError("bad source")])
def test_an_exception_leaves_nothing(error: BaseException, out: Path) -> None:
    with pytest.raises(type(error)), CheckpointWriter(out, SHARDS, METADATA) as writer:
        writer.write("z.weight", TENSORS["z.weight"])
        assert left(out) == ["out.partial"]
        raise error
    assert left(out) == []


def test_an_exception_after_the_shards_leaves_nothing(out: Path) -> None:
    with pytest.raises(RuntimeError), CheckpointWriter(out, SHARDS, METADATA) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.wait()
        raise RuntimeError
    assert left(out) == []


def test_a_failure_of_the_disk_is_told_by_the_next_call(out: Path) -> None:
    shards = {"no/such/place.safetensors": [OutputTensor("a", "U8", (4,)), OutputTensor("b", "U8", (4,))]}
    with (
        pytest.raises(ResourceError, match=r"cannot be written .* no unfinished output was left"),
        CheckpointWriter(out, shards, METADATA) as writer,
    ):
        for name in "ab":
            writer.write(name, torch.zeros(4, dtype=torch.uint8))
        writer.wait()
    assert left(out) == []


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot be written"), CheckpointWriter(tmp_path / "file/out", SHARDS, METADATA):
        pytest.fail("entered")


def test_bugs_of_the_caller_are_asserted(out: Path) -> None:
    z = TENSORS["z.weight"]
    info = TensorInfo("z.weight", "F16", (7, 5), out / "x.safetensors", 8, 70)
    with CheckpointWriter(out, SHARDS, METADATA) as writer:
        for wrong in (
            lambda: writer.write("a.weight", TENSORS["a.weight"]),  # not its turn
            lambda: writer.write("z.weight", z.T),
            lambda: writer.write("z.weight", z.float()),
            lambda: writer.write("z.weight", z.half()),  # as many bytes, other values
            lambda: writer.write_pieces("z.weight", [z, z]),
            lambda: writer.write_pieces("z.weight", [z[:3]]),
            lambda: writer.copy(info),
            writer.wait,  # tensors are missing
        ):
            writer._next = 0
            with pytest.raises(AssertionError):
                wrong()


def test_a_copy_may_have_another_name(written: Path, tmp_path: Path) -> None:
    info = Checkpoint.open(written).tensors["z.weight"]
    with CheckpointWriter(tmp_path / "copy", {SINGLE_NAME: [OutputTensor("y.weight", info.dtype, info.shape)]}, METADATA) as writer:
        writer.copy(info, "y.weight")
        writer.wait()
        writer.finish()
    loaded = load_file(tmp_path / "copy" / SINGLE_NAME)
    assert list(loaded) == ["y.weight"] and same_bits(loaded["y.weight"], TENSORS["z.weight"])


def test_linked_shards_are_the_same_files_and_indexed(written: Path, tmp_path: Path) -> None:
    shards = Checkpoint.open(written).shards
    with CheckpointWriter(tmp_path / "linked", {"n.safetensors": [OutputTensor("n", "F32", ())]}, METADATA, linked=shards) as writer:
        writer.write("n", torch.tensor(1.0))
        writer.wait()
        writer.finish()
    assert all((tmp_path / "linked" / file).samefile(written / file) for file in SHARDS)
    index = json.loads((tmp_path / "linked" / INDEX_NAME).read_text())
    assert index["weight_map"].keys() == {"n", *TENSORS} and index["weight_map"]["z.weight"] == "model-1.safetensors"
    assert index["metadata"]["total_size"] == 4 + sum(tensor.nbytes for tensor in TENSORS.values())


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free space or choose another disk"),
        (errno.EIO, "free space or choose another disk"),
        (errno.EACCES, "change the permissions"),
        (errno.EROFS, "name a place that can be written"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ENOENT, "choose another disk"),
    ],
)
def test_what_to_try_fits_what_the_disk_says(number: int, hint: str) -> None:
    assert hint in str(disk_failure(Path("out"), OSError(number, os.strerror(number))))


def test_whoever_waits_for_a_step_hears_of_a_full_disk(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails behind the end of the step, when nothing more is appended that could raise it."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ResourceError, match="cannot be written"), CheckpointWriter(out, SHARDS, METADATA) as writer:
        monkeypatch.setattr(os, "pwritev", full)
        for name in list(TENSORS)[:3]:
            writer.write(name, TENSORS[name])
        writer.end_step("one")
        writer.wait_for_step("one")
    assert left(out) == []
