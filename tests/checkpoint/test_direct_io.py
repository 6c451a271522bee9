import errno
import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtpress.checkpoint import direct_io as disk
from mtpress.checkpoint.direct_io import BLOCK_BYTES, O_DIRECT, StagedFile, aligned_buffer, opened, read_pieces, read_range, round_up
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.errors import InputError

SIZES = (0, 1, 4095, 4096, 4097, 8192, 20_000)
OFFSETS = (0, 1, 7, 4095, 4096, 4097, 12_289)
CONTENT = random.Random(0).randbytes(OFFSETS[-1] + SIZES[-1])
SMALL_PIECE = 2 * BLOCK_BYTES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "PIECE_BYTES", SMALL_PIECE)


@pytest.fixture
def refusing_direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The flags of every open(); those past the page cache are refused, as tmpfs and many network disks do."""
    flags_seen: list[int] = []
    original = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        flags_seen.append(flags)
        if flags & O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    return flags_seen


def stored(path: Path, offset: int, num_bytes: int) -> TensorInfo:
    return TensorInfo("t", "U8", (num_bytes,), path, offset, num_bytes)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("num_bytes", SIZES)
def test_pieces_end_to_end_are_the_stored_bytes(path: Path, offset: int, num_bytes: int, small_pieces: None) -> None:
    pieces = [bytes(piece) for piece in read_pieces(stored(path, offset, num_bytes))]
    assert b"".join(pieces) == CONTENT[offset : offset + num_bytes]
    assert all(0 < len(piece) <= SMALL_PIECE for piece in pieces)
    assert len(pieces) == -(-num_bytes // SMALL_PIECE)


def test_a_piece_of_the_usual_size(path: Path) -> None:
    (piece,) = (bytes(piece) for piece in read_pieces(stored(path, 5, len(CONTENT) - 5)))
    assert piece == CONTENT[5:]


@pytest.mark.parametrize("start", OFFSETS)
@pytest.mark.parametrize("num_bytes", SIZES)
def test_a_range_stands_where_it_stands_in_its_first_block(path: Path, start: int, num_bytes: int) -> None:
    into = aligned_buffer(num_bytes + 2 * BLOCK_BYTES)
    info = stored(path, start, num_bytes)
    with opened(info) as file:
        read_range(file, into, start, start + num_bytes, info)
    place = start % BLOCK_BYTES
    assert into[place : place + num_bytes] == CONTENT[start : start + num_bytes]


def test_short_reads_go_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = 0, os.preadv

    def halves(file: int, buffers: list[memoryview], position: int) -> int:
        nonlocal calls
        calls += 1
        return original(file, [buffers[0][: 2 * BLOCK_BYTES]], position) - 1  # the byte lost makes a block to be read again

    monkeypatch.setattr(os, "preadv", halves)
    assert b"".join(bytes(piece) for piece in read_pieces(stored(path, 3, 20_000))) == CONTENT[3:20_003]
    assert calls >= 4


@pytest.mark.parametrize("left", [0, 100, 4096, 8192, 8200, 19_000])
def test_a_file_that_is_cut_while_it_is_read_is_one_line(path: Path, left: int, small_pieces: None) -> None:
    pieces = read_pieces(stored(path, 3, 20_000))
    assert bytes(next(pieces)) == CONTENT[3 : 3 + SMALL_PIECE]
    os.truncate(path, left)  # the second piece may have been read ahead, the third not
    with pytest.raises(InputError, match=r"file: ends inside tensor t; it changed while it was read, start again$"):
        list(pieces)


def test_a_file_that_is_not_there_or_fails_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"gone: cannot be read \(No such file or directory\)"):
        list(read_pieces(stored(path.with_name("gone"), 0, 10)))

    def broken(*rest: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(InputError, match=r"file: cannot be read \(Input/output error\)"):
        list(read_pieces(stored(path, 0, 10)))


@pytest.mark.skipif(not O_DIRECT, reason="this system reads through the page cache anyway")
def test_where_direct_reading_is_refused_the_page_cache_serves(path: Path, refusing_direct: list[int], small_pieces: None) -> None:
    assert b"".join(bytes(piece) for piece in read_pieces(stored(path, 3, 20_000))) == CONTENT[3:20_003]
    assert [bool(flags & O_DIRECT) for flags in refusing_direct] == [True, False]


@pytest.mark.skipif(not O_DIRECT, reason="this system writes through the page cache anyway")
def test_where_direct_writing_is_refused_the_page_cache_serves(tmp_path: Path, refusing_direct: list[int], small_pieces: None) -> None:
    file = StagedFile(tmp_path / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    file.append(memoryview(CONTENT))
    file.close(whole=True)
    assert (tmp_path / "new").read_bytes() == CONTENT
    assert [bool(flags & O_DIRECT) for flags in refusing_direct] == [True, False]


def test_other_refusals_of_open_are_raised(tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    with pytest.raises(FileExistsError):
        StagedFile(tmp_path / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with pytest.raises(FileNotFoundError):
        StagedFile(tmp_path / "no" / "new", os.O_WRONLY | os.O_CREAT)


def new_file(path: Path) -> StagedFile:
    return StagedFile(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


@pytest.mark.parametrize("seed", range(8))
def test_appended_bytes_end_to_end_are_the_file(seed: int, tmp_path: Path, small_pieces: None) -> None:
    numbers = random.Random(seed)
    sizes = [numbers.choice((0, 1, 100, 4095, 4096, 4097, SMALL_PIECE, numbers.randrange(60_000))) for _ in range(40)]
    content = numbers.randbytes(sum(sizes))
    file, position = new_file(tmp_path / "new"), 0
    for size in sizes:
        file.append(memoryview(content)[position : position + size])
        position += size
        assert file.end == position
        if numbers.random() < 0.2:
            file.flush()
    file.close(whole=True)
    assert (tmp_path / "new").read_bytes() == content


def test_an_empty_file_is_empty(tmp_path: Path) -> None:
    new_file(tmp_path / "new").close(whole=True)
    assert (tmp_path / "new").read_bytes() == b""


def test_a_file_that_is_not_whole_holds_what_was_flushed_and_its_padding(tmp_path: Path, small_pieces: None) -> None:
    file = new_file(tmp_path / "new")
    file.append(memoryview(CONTENT)[:5000])
    file.flush()
    file.append(memoryview(CONTENT)[5000:6000])
    file.close(whole=False)
    written = (tmp_path / "new").read_bytes()
    assert len(written) == 2 * BLOCK_BYTES
    assert written[:5000] == CONTENT[:5000]


@pytest.fixture
def slow_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwritev

    def slow(file: int, buffers: list[memoryview], position: int) -> int:
        time.sleep(0.005)
        return original(file, buffers, position)

    monkeypatch.setattr(os, "pwritev", slow)


def test_what_then_is_given_runs_behind_the_bytes_before_it(tmp_path: Path, small_pieces: None, slow_writes: None) -> None:
    file, called = new_file(tmp_path / "new"), list[int]()

    def look(end: int) -> Callable[[], None]:
        def then() -> None:
            assert (tmp_path / "new").read_bytes()[:end] == CONTENT[:end]
            called.append(end)

        return then

    position = 0
    for size in (1, 4095, 4096, 10_000, 0, 3, 9000):
        file.append(memoryview(CONTENT)[position : position + size])
        position += size
        file.then(look(position))
    file.close(whole=True)
    assert called == [1, 4096, 8192, 18_192, 18_192, 18_195, 27_195]
    assert (tmp_path / "new").read_bytes() == CONTENT[:27_195]


def test_what_then_is_given_may_fail(tmp_path: Path) -> None:
    file, called = new_file(tmp_path / "new"), list[str]()

    def fail() -> None:
        raise RuntimeError("not today")

    file.append(memoryview(CONTENT))
    file.then(fail)
    file._pool.submit(lambda: None).result()  # all that was asked for is done
    with pytest.raises(RuntimeError, match="not today"):
        file.then(lambda: called.append("after"))
    with pytest.raises(RuntimeError, match="not today"):
        file.close(whole=True)
    assert called == []


@pytest.mark.parametrize("end", [1, 4095, 4096, 4097, 8192, 9000, 20_000])
def test_a_file_goes_on_behind_its_end(end: int, path: Path, small_pieces: None) -> None:
    behind = hashlib.sha256(b"other").digest() * 1000
    file = StagedFile(path, os.O_RDWR, end)
    assert file.end == end
    assert path.stat().st_size == end  # what stood there is of a step that did not finish
    file.append(memoryview(behind))
    file.close(whole=True)
    assert path.read_bytes() == CONTENT[:end] + behind


def test_a_file_that_ends_early_cannot_go_on(path: Path) -> None:
    with pytest.raises(InputError, match="file: ends early; it changed while it was written"):
        StagedFile(path, os.O_RDWR, len(CONTENT) + 10)


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_write_that_fails_stops_everything(failing: int, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, called, original = 0, list[str](), os.pwritev

    def once(file: int, buffers: list[memoryview], position: int) -> int:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(file, buffers, position)

    monkeypatch.setattr(os, "pwritev", once)
    file = new_file(tmp_path / "new")
    with pytest.raises(OSError, match="No space left"):
        for _ in range(failing + disk.NUM_STAGES + 1):
            file.append(memoryview(CONTENT)[:SMALL_PIECE])
    with pytest.raises(OSError, match="No space left"):
        file.then(lambda: called.append("behind a failure"))
    with pytest.raises(OSError, match="No space left"):
        file.close(whole=True)
    assert calls == failing
    assert called == []
    assert (tmp_path / "new").stat().st_size == (failing - 1) * SMALL_PIECE


def test_a_write_that_fails_at_the_very_end_is_raised_by_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = new_file(tmp_path / "new")
    file.append(memoryview(CONTENT))
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space left"):
        file.close(whole=True)


def test_short_writes_go_on_and_one_of_nothing_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = 0, os.pwritev

    def short(file: int, buffers: list[memoryview], position: int) -> int:
        nonlocal calls
        calls += 1
        written = original(file, [buffers[0][: 2 * BLOCK_BYTES]], position)
        return written - (1 if written < len(buffers[0]) else 0)  # the disk counts bytes, a direct write goes on from a block

    monkeypatch.setattr(os, "pwritev", short)
    file = new_file(tmp_path / "new")
    file.append(memoryview(CONTENT))
    file.close(whole=True)
    assert (tmp_path / "new").read_bytes() == CONTENT
    assert calls > 4
    monkeypatch.setattr(os, "pwritev", lambda *rest: 100)  # less than a block: no room for another
    file = new_file(tmp_path / "full")
    file.append(memoryview(CONTENT))
    with pytest.raises(OSError, match="No space left"):
        file.close(whole=True)


def test_buffers_start_on_a_block_and_are_zero() -> None:
    for num_bytes in (0, 1, 4096, 4097, disk.PIECE_BYTES):
        buffer = aligned_buffer(num_bytes)
        assert len(buffer) == max(round_up(num_bytes), BLOCK_BYTES)
        assert len(buffer) % BLOCK_BYTES == 0
        assert not any(buffer[:BLOCK_BYTES]) and not any(buffer[-BLOCK_BYTES:])
