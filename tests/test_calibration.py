"""Calibration sets: from JSON lines, from the set that ships with mtpress, from data sets by the real `datasets` library."""

import json
import os
from pathlib import Path

import pytest
import torch

from mtpress.builtin import BUILTIN_MODEL, CALIBRATION_FILE, EVALUATION_FILE
from mtpress.calibration import MAX_LINE_BYTES, InputAmax, check_row, load_calibration, read_hub, read_jsonl
from mtpress.chat import ChatEncoder
from mtpress.errors import InputError
from mtpress.recipe import CalibrationSource


def test_builtin_samples_go_through_the_chat_template() -> None:
    loaded = load_calibration(BUILTIN_MODEL, CalibrationSource(num_samples=20), [])
    assert len(loaded.samples) == 20
    encoder = ChatEncoder(BUILTIN_MODEL)
    where, row = next(
        (w, r) for w, r in read_jsonl(CALIBRATION_FILE) if "messages" in r and "tools" not in r and "enable_thinking" not in r
    )
    text = encoder.render(row["messages"])
    assert text.startswith("<|im_start|>user\n")
    number = int(where.rsplit(":", 1)[1]) - 1
    assert torch.equal(loaded.samples[number].input_ids, encoder.encode_text(text).input_ids)


def test_samples_go_through_the_template_that_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "red"}]}))
    loaded = load_calibration(BUILTIN_MODEL, CalibrationSource(), [str(tmp_path / "a.jsonl")], "{{ messages[0].content }} and blue")
    assert torch.equal(loaded.samples[0].input_ids, ChatEncoder(BUILTIN_MODEL).encode_text("red and blue").input_ids)


def test_samples_are_cut_at_max_seq_len_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "red " * n}) for n in (5, 50, 500)))
    loaded = load_calibration(BUILTIN_MODEL, CalibrationSource(num_samples=2, max_seq_len=20), [str(tmp_path / "a.jsonl")])
    assert len(loaded.samples) == 2
    assert len(loaded.samples[1].input_ids) == 20
    assert loaded.num_truncated == 1
    assert loaded.record()["num_tokens"] == loaded.num_tokens


def test_identity_follows_the_tokens() -> None:
    one, same, other = (load_calibration(BUILTIN_MODEL, CalibrationSource(num_samples=n), ["builtin"]) for n in (3, 3, 4))
    assert one.identity == same.identity != other.identity


def test_calibration_and_evaluation_sets_are_disjoint() -> None:
    lines = [set(file.read_text().splitlines()) for file in (CALIBRATION_FILE, EVALUATION_FILE)]
    assert len(lines[0]) == len(lines[1]) == 128
    assert not lines[0] & lines[1]


def test_a_data_set_is_read_by_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    turns = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello!"}]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(json.dumps({"messages": turns}) for _ in range(5)))
    rows = list(read_hub(CalibrationSource(dataset=str(tmp_path / "set"), num_samples=3)))
    assert len(rows) == 3
    assert rows[0][1]["messages"] == turns


def test_a_data_set_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="--calibration builtin"):
        list(read_hub(CalibrationSource(dataset="neuralmagic/calibration", subset="LLM")))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "video", "video": "a.mp4"}]},
        {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "user", "content": [{"type": ["text"], "text": "a"}]},
        {"role": "assistant", "content": "a", "tool_calls": ["weather"]},
        {"role": "assistant", "content": "a", "tool_calls": [{"function": {"arguments": {}}}]},
    ],
)
def test_a_message_that_a_template_would_pass_over_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"^row 4: message 1: "):
        check_row({"messages": [message]}, "row 4")


def test_parts_and_tool_calls_of_every_known_form_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"text": "b"}, {"type": "image_url", "image_url": {"url": "a.png"}}, {"image": "a.png"}]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}, {"name": "f", "arguments": {}}]
    talk = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None, "tool_calls": calls}], "tools": [{}]}
    assert check_row(talk, "row 1") is talk


def test_a_line_without_end_is_not_read_whole(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.truncate(MAX_LINE_BYTES * 500)  # 8 GB of zeros that take no disk
    with pytest.raises(InputError, match=r"a\.jsonl:1: line over 16 MB"):
        list(read_jsonl(tmp_path / "a.jsonl"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="is not a file"):
        list(read_jsonl(tmp_path / "pipe.jsonl"))


def test_amax_runs_over_what_is_seen() -> None:
    amax = InputAmax()
    for values in ([1.0, -3.0], [2.5, 0.0]):
        amax("a", torch.tensor(values, dtype=torch.bfloat16))
    amax("b", torch.tensor([-7.0]))
    assert amax.of_group(["a"]) == 3.0
    assert amax.of_group(["a", "b"]) == 7.0


def test_amax_of_shares_is_that_of_all() -> None:
    samples = [torch.randn(5, 8, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(7)]
    whole, merged = InputAmax(), InputAmax()
    for share in ((0, 3), (1, 2, 4, 5, 6), ()):
        seen = InputAmax()
        for i in share:
            for name, factor in (("a", 1.0), ("b", -3.0)):
                seen(name, factor * samples[i])
                whole(name, factor * samples[i])
        merged.merge({name: float(value) for name, value in seen.amax.items()})  # as a worker answers
    assert merged.amax.keys() == {"a", "b"}
    assert all(torch.equal(merged.amax[name], whole.amax[name]) for name in "ab")
    assert all(value.dtype == torch.float32 and value.shape == () for value in merged.amax.values())
    merged.merge({"a": 0.0, "c": 2.0})
    assert torch.equal(merged.amax["a"], whole.amax["a"]) and merged.amax["c"] == 2.0
    merged.merge({"a": float("nan")})  # damaged weights must be noticed, whichever worker sees them
    merged.merge({"a": 1.0})
    assert merged.of_group(["a"]).isnan()
