import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mtpress.checkpoint.journal import JOURNAL_NAME, RUN_NAME, Finished, Journal, difference
from mtpress.errors import InputError, ResourceError

SHARD = "model-00001-of-00002.safetensors"
STEPS = [Finished(f"layer {i}", 10 * i, 1000 * i + 7, f"{i:064x}", {"größe.weight": "ab" * 32} if i else {}) for i in range(4)]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    (tmp_path / "out.partial" / JOURNAL_NAME).mkdir(parents=True)
    return Journal(tmp_path / "out.partial")


def lines_of(journal: Journal, shard: str = SHARD) -> Path:
    return journal.directory / f"{shard}.jsonl"


def test_what_is_appended_is_finished_in_order(journal: Journal) -> None:
    assert journal.finished(SHARD) == []
    for i, step in enumerate(STEPS):
        journal.append(SHARD, step)
        assert journal.finished(SHARD) == STEPS[: i + 1]
    assert Journal(journal.directory.parent).finished(SHARD) == STEPS
    assert journal.finished("another.safetensors") == []
    journal.append("another.safetensors", STEPS[0])
    assert journal.num_finished() == len(STEPS) + 1


@pytest.mark.parametrize("num_whole", [0, 1, 3])
def test_a_torn_last_line_counts_as_not_written(num_whole: int, journal: Journal) -> None:
    whole = b"".join(json.dumps(vars(step)).encode() + b"\n" for step in STEPS[:num_whole])
    torn = json.dumps(vars(STEPS[num_whole])).encode()
    for length in range(1, len(torn) + 1):
        lines_of(journal).write_bytes(whole + torn[:length])
        assert journal.finished(SHARD) == STEPS[:num_whole]
        assert lines_of(journal).read_bytes() == whole + torn[:length]  # its writer may be writing on
        journal.append(SHARD, STEPS[num_whole])  # not glued to what was torn
        assert journal.finished(SHARD) == STEPS[: num_whole + 1]


@pytest.mark.parametrize("line", [b"{", b"[]", b"3", b'{"step": "layer 1"}', b"\xff\xfe", b"", b'{"step": "a", "more": 1}'])
def test_a_whole_line_that_mtpress_did_not_write_is_refused(line: bytes, journal: Journal) -> None:
    journal.append(SHARD, STEPS[0])
    with lines_of(journal).open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(InputError, match=r"jsonl: is not what mtpress wrote; delete .*out\.partial to start over"):
        journal.finished(SHARD)


def test_a_disk_that_takes_half_a_line_is_full(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append(SHARD, STEPS[0])
    original = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: original(file, data[: len(data) // 2]))
        with pytest.raises(OSError) as caught:
            journal.append(SHARD, STEPS[1])
        assert caught.value.errno == errno.ENOSPC
    assert journal.finished(SHARD) == STEPS[:1]
    journal.append(SHARD, STEPS[1])
    assert journal.finished(SHARD) == STEPS[:2]


RUN: dict[str, Any] = {"recipe": {"rounding": "max", "skip": [1, 2]}, "source": {"a.safetensors": {"size": 10}}, "calibration": None}


def test_a_run_is_told_from_another(journal: Journal) -> None:
    journal.begin(RUN)
    journal.refuse_other_run(RUN)
    journal.refuse_other_run({**RUN, "recipe": {"rounding": "max", "skip": (1, 2)}})  # JSON knows no tuples
    with pytest.raises(InputError) as caught:
        journal.refuse_other_run({**RUN, "recipe": {"rounding": "gptq", "skip": [1, 2]}})
    partial = journal.directory.parent
    assert str(caught.value) == (
        f"--resume: {partial} was begun with recipe rounding max, not gptq; call it as it was begun, or delete it to start over"
    )


def test_a_run_that_cannot_be_told_leaves_the_old_one(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.begin(RUN)
    original = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: original(file, data[:5]))
        with pytest.raises(OSError, match="No space left"):
            journal.begin({"other": 1})
    journal.refuse_other_run(RUN)
    journal.begin({"other": 1})
    journal.refuse_other_run({"other": 1})
    assert json.loads((journal.directory / RUN_NAME).read_text()) == {"other": 1}


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        (RUN, RUN, None),
        ({"a": 1}, {"a": 1, "b": None}, None),
        ({"a": 1}, {"a": 2}, "a 1, not 2"),
        ({"a": {"b": {"c": "x"}}}, {"a": {"b": {"c": "y"}}}, "a b c x, not y"),
        ({"a": True}, {"a": 0.5}, "a true, not 0.5"),
        ({"a": [1, 2]}, {"a": [1]}, "a [1, 2], not [1]"),
        ({"a": {"b": 1}}, {"a": None}, 'a {"b": 1}, not null'),
        ({"a": 1}, {"a": 1, "b": 2}, "b null, not 2"),
        ({"a": 1, "b": 2}, {"a": 1}, "b 2, not null"),
        ({"a": 1, "b": 2}, {"b": 3, "a": 4}, "a 1, not 4"),
        ({"a": "ä" * 70}, {"a": ""}, f"a {'ä' * 24}…, not "),
        (1, 2, " 1, not 2"),
    ],
)
def test_the_first_difference_is_named(old: object, new: object, shown: str | None) -> None:
    assert difference(old, new) == shown


@pytest.mark.parametrize("name", ["lock", f"{SHARD}.lock"])
def test_another_process_that_writes_there_is_noticed(name: str, journal: Journal) -> None:
    hold = "import sys; from pathlib import Path; from mtpress.checkpoint.journal import Journal; held = Journal(Path(sys.argv[1]))\n"
    hold += "held.lock(sys.argv[2]); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(journal.directory.parent), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(ResourceError, match=r"out\.partial: another mtpress is writing there; wait for it or choose another OUT"):
                journal.lock(name)
        Journal(journal.directory.parent).lock("some other lock")
        other.kill()  # a lock ends with the process that holds it
        other.wait()
    journal.lock(name)
    with pytest.raises(ResourceError):
        Journal(journal.directory.parent).lock(name)
    journal.unlock()
    again = Journal(journal.directory.parent)
    again.lock(name)
    again.unlock()
    again.unlock()
