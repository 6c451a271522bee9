import errno
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mtpress.errors import InputError, ResourceError
from mtpress.models.hidden_states import NUM_SLOTS, NUM_WAITING, DiskStates, MemoryStates, slot_file, sync_states

HIDDEN = 24
LENGTHS = [5, 1, 17, 3, 40, 2]
Make = Callable[..., DiskStates]


def states_of(sample: int, boundary: int) -> torch.Tensor:
    """What sample i of the set holds at a boundary: other bits for every pair of them."""
    generator = torch.Generator().manual_seed(100 * boundary + sample)
    return torch.randn(1, LENGTHS[sample], HIDDEN, generator=generator).bfloat16()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    (tmp_path / "out.partial").mkdir()
    made: list[DiskStates] = []

    def one(boundary: int = 0, members: Sequence[int] | None = None) -> DiskStates:
        made.append(DiskStates(tmp_path / "out.partial", LENGTHS, HIDDEN, boundary=boundary, members=members))
        return made[-1]

    yield one
    for states in made:
        states.close()


def embed(states: DiskStates | MemoryStates, members: Sequence[int]) -> None:
    for i, member in enumerate(members):
        states.put(i, states_of(member, 0))
    states.settle()
    states.advance()


def pass_layer(states: DiskStates | MemoryStates, members: Sequence[int], boundary: int) -> None:
    """A layer: what is read is what the last one put, and the next boundary's states are put."""
    for i, member in enumerate(members):
        assert torch.equal(states.get(i), states_of(member, boundary))
        states.put(i, states_of(member, boundary + 1))
    states.advance()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_is_put_is_what_is_read_layer_after_layer(kind: str, make: Make) -> None:
    states = MemoryStates() if kind == "memory" else make()
    members = range(len(LENGTHS))
    embed(states, members)
    for boundary in range(2 * NUM_SLOTS + 1):
        pass_layer(states, members, boundary)
    order = random.Random(0).sample(members, len(LENGTHS))
    for i in [*order, order[-1]]:  # in any order, and twice
        found = states.get(i)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, states_of(i, 2 * NUM_SLOTS + 1))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_a_sample_may_be_put_again_before_the_first_layer(kind: str, make: Make) -> None:
    states = MemoryStates() if kind == "memory" else make()
    for i in range(len(LENGTHS)):
        states.put(i, states_of(i, 0))
    states.settle()
    assert torch.equal(states.get(2), states_of(2, 0))
    states.put(2, states_of(2, 7))  # as pictures take the place of their tokens
    states.settle()
    states.advance()
    assert torch.equal(states.get(1), states_of(1, 0))
    assert torch.equal(states.get(2), states_of(2, 7))


def test_float32_is_stored_as_bfloat16(make: Make) -> None:
    states, wide = make(), torch.randn(1, LENGTHS[0], HIDDEN, generator=torch.Generator().manual_seed(0))
    states.put(0, wide)
    states.settle()
    assert torch.equal(states.get(0), wide.bfloat16())


@pytest.mark.parametrize("shares", [([0, 2, 4], [1, 3, 5]), ([4], [0, 1, 2, 3, 5]), ([0, 1, 2, 3, 4, 5], [])])
def test_workers_share_the_files(shares: tuple[list[int], list[int]], make: Make, tmp_path: Path) -> None:
    workers = [make(members=share) for share in shares]
    for worker, share in zip(workers, shares, strict=True):
        embed(worker, share)
    for boundary in range(4):
        for worker, share in zip(workers, shares, strict=True):
            pass_layer(worker, share, boundary)
    one = make(boundary=4)  # goes on alone with what they left
    pass_layer(one, range(len(LENGTHS)), 4)
    whole = b"".join(states_of(i, 5).view(torch.uint8).numpy().tobytes() for i in range(len(LENGTHS)))
    assert slot_file(tmp_path / "out.partial", 5).read_bytes() == whole


def test_three_boundaries_stay_on_disk(make: Make, tmp_path: Path) -> None:
    states = make()
    embed(states, range(len(LENGTHS)))
    for boundary in range(4):
        pass_layer(states, range(len(LENGTHS)), boundary)
    for boundary in (2, 3, 4):
        states.sync(boundary)
        sync_states(tmp_path / "out.partial", boundary)
        again = make(boundary=boundary, members=[3])
        assert torch.equal(again.get(0), states_of(3, boundary))
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == ["hidden-0.bin", "hidden-1.bin", "hidden-2.bin"]


def test_states_that_are_not_there_are_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the hidden states in front of layer 2 are not there; delete .* to start over"):
        make(boundary=2)
    states = make()
    embed(states, range(len(LENGTHS)))
    pass_layer(states, range(len(LENGTHS)), 0)
    file = slot_file(tmp_path / "out.partial", 1)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(InputError, match="in front of layer 1 are not there"):
        make(boundary=1)
    with pytest.raises(InputError, match="hidden states end early"):
        states.get(len(LENGTHS) - 1)


def test_refused_states_leave_no_file_open(make: Make) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    for _ in range(5):
        with pytest.raises(InputError):
            make(boundary=1)
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"no-such: cannot be written"):
        DiskStates(tmp_path / "no-such", LENGTHS, HIDDEN)


@pytest.mark.parametrize("asked", ["settle", "advance"])
def test_a_write_that_fails_is_raised_and_nobody_waits_for_it(asked: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*rest: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    states = make()
    monkeypatch.setattr(os, "pwritev", full)
    for i in range(len(LENGTHS)):  # more than may wait: none of them waits for room for ever
        states.put(i, states_of(i, 0))
    assert len(LENGTHS) > NUM_WAITING
    with pytest.raises(ResourceError, match=r"cannot be written \(No space left on device\); free space or choose another disk"):
        getattr(states, asked)()


def test_short_reads_and_writes_go_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    originals = {name: getattr(os, name) for name in ("preadv", "pwritev")}

    def short(name: str) -> Callable[..., int]:
        def some(file: int, buffers: list[memoryview], position: int) -> int:
            nonlocal calls
            calls += 1
            moved: int = originals[name](file, [buffers[0][:7]], position)
            return moved

        return some

    for name in originals:
        monkeypatch.setattr(os, name, short(name))
    states = make()
    embed(states, range(len(LENGTHS)))
    pass_layer(states, range(len(LENGTHS)), 0)
    assert calls > sum(LENGTHS) * HIDDEN * 2 // 7


def test_no_more_samples_wait_in_memory_than_allowed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    states, original = make(), os.pwritev
    waiting: list[int] = []

    def look(*rest: Any) -> int:
        waiting.append(sum(not written.done() for written in states._written))
        return original(*rest)

    monkeypatch.setattr(os, "pwritev", look)
    embed(states, range(len(LENGTHS)))
    assert len(waiting) == len(LENGTHS)
    assert max(waiting) <= NUM_WAITING + 1
