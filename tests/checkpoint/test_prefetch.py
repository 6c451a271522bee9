import hashlib
import random
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch

from mtpress.checkpoint import prefetch
from mtpress.checkpoint.prefetch import SAMPLE_BYTES, Prefetch
from mtpress.checkpoint.safetensors import DTYPE_BITS, TensorInfo, read_tensor
from mtpress.errors import InputError

CPU = torch.device("cpu")
CONTENT = random.Random(0).randbytes(200_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


def stored(path: Path, name: str, dtype: str, shape: tuple[int, ...], offset: int) -> TensorInfo:
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    return TensorInfo(name, dtype, shape, path, offset, bits // 8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def groups_of(path: Path) -> list[list[TensorInfo]]:
    """Groups of unlike sizes: offsets that are odd or inside a block, neighbours, an empty tensor, one given out of file order."""
    return [
        [stored(path, "a", "BF16", (3, 5), 8), stored(path, "b", "BF16", (4096,), 38)],
        [stored(path, "c", "BF16", (100, 33), 12_289), stored(path, "d", "F32", (7,), 4095), stored(path, "e", "U8", (), 77)],
        [stored(path, "f", "F32", (0, 4), 4096), stored(path, "g", "F32", (), 199_996)],
        [stored(path, "h", "BF16", (90_000,), 19_999)],
        [stored(path, "i", "F8_E4M3", (5, 5), 150_001), stored(path, "j", "I64", (2,), 8191)],
    ]


def test_tensors_are_the_stored_ones_while_they_are_valid(path: Path) -> None:
    groups = groups_of(path)
    assert any(info.offset % 2 and info.dtype == "BF16" for group in groups for info in group)
    with closing(Prefetch(groups, CPU).load()) as weights:
        for group in groups:
            tensors = next(weights)
            assert list(tensors) == [info.name for info in sorted(group, key=lambda i: i.offset)]
            assert all(same_bits(tensors[info.name], read_tensor(info)) for info in group)
        assert next(weights, None) is None


def test_a_group_stays_valid_while_the_next_is_read(path: Path) -> None:
    groups = [[stored(path, str(i), "BF16", (5000,), 1 + 10_000 * i)] for i in range(10)]
    reading = Prefetch(groups, CPU)
    for number, tensors in enumerate(reading.load()):
        reading.pool.submit(lambda: None).result()  # the next group is read by now
        assert same_bits(tensors[str(number)], read_tensor(groups[number][0]))


@pytest.mark.parametrize("sampled", [{"a", "c", "h", "f"}, set()])
def test_digests_are_those_of_the_stored_beginnings_and_ends(sampled: set[str], path: Path) -> None:
    groups, reading = groups_of(path), Prefetch(groups_of(path), CPU, sampled)
    seen = set[str]()
    for group, _ in zip(groups, reading.load(), strict=True):
        wanted = {info.name: info for info in group if info.name in sampled}
        assert reading.digests.keys() == wanted.keys()  # of no group that is not handed out
        for name, info in wanted.items():
            content = CONTENT[info.offset : info.offset + info.num_bytes]
            assert (len(content) > 2 * SAMPLE_BYTES) == (name == "h")
            expected = content[:SAMPLE_BYTES] + content[-SAMPLE_BYTES:] if name == "h" else content
            assert reading.digest(name) == hashlib.sha256(expected).hexdigest()
        seen |= wanted.keys()
    assert seen == sampled


def test_at_most_one_group_is_read_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    original = Prefetch._load
    monkeypatch.setattr(Prefetch, "_load", lambda self, number, free: begun.append(number) or original(self, number, free))
    groups = [[stored(path, str(i), "U8", (5000,), 6000 * i)] for i in range(6)]
    reading = Prefetch(groups, CPU)
    with closing(reading.load()) as weights:
        assert begun == []
        for number in range(4):
            next(weights)
            reading.pool.submit(lambda: None).result()
            assert begun == list(range(number + 2))
    assert begun == [0, 1, 2, 3, 4]  # closed, it reads no more
    assert not any(thread.name.startswith("mtpress-prefetch") for thread in threading.enumerate())


def test_nothing_to_read(path: Path) -> None:
    assert list(Prefetch([], CPU).load()) == []
    assert list(Prefetch([[]], CPU).load()) == [{}]


def test_a_file_that_ends_early_is_one_line_when_its_group_is_asked_for(path: Path) -> None:
    groups = [[stored(path, "a", "U8", (10,), 5)], [stored(path, "b", "U8", (10,), 199_995)], [stored(path, "c", "U8", (1,), 0)]]
    with closing(Prefetch(groups, CPU).load()) as weights:
        next(weights)
        with pytest.raises(InputError, match=r"file: ends inside tensor b; it changed while it was read"):
            next(weights)


def test_groups_of_two_files(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "another"
    other.write_bytes(CONTENT[::-1])
    group = [stored(path, "a", "BF16", (500,), 3), stored(other, "b", "BF16", (500,), 3), stored(path, "c", "U8", (5,), 1100)]
    (tensors,) = (dict(tensors) for tensors in Prefetch([group], CPU).load())
    assert all(same_bits(tensors[info.name], read_tensor(info)) for info in group)


def test_two_buffers_of_the_largest_group(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = prefetch.aligned_buffer
    monkeypatch.setattr(prefetch, "aligned_buffer", lambda size: sizes.append(size) or original(size))
    groups = groups_of(path)
    list(Prefetch(groups, CPU).load())
    most = max(sum(info.num_bytes for info in group) for group in groups)
    assert len(sizes) == 2
    assert all(most <= size <= most + 2 * 3 * 4096 for size in sizes)
