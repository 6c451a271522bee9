"""Calibration sets: from JSON lines, from the set that ships with mtpress, from data sets by the real `datasets` library."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from mtpress.builtin import BUILTIN_MODEL, CALIBRATION_FILE, CALIBRATION_IMAGES_FILE, EVALUATION_FILE, EVALUATION_IMAGES_FILE
from mtpress.calibration.samples import MAX_LINE_BYTES, CalibrationSet, InputAmax, check_row, load_calibration, read_hub, read_jsonl
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.images import open_image
from mtpress.chat.messages import vision_parts
from mtpress.data import hub_rows
from mtpress.errors import InputError
from mtpress.plan.recipe import CalibrationSource


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


def pictures_of(file: Path) -> list[str]:
    """Hash of the pixels of every picture of a set."""
    sources = [source for _, row in read_jsonl(file) for source, _ in vision_parts(row["messages"], "image")]
    return [hashlib.sha256(open_image(source, "here").tobytes()).hexdigest() for source in sources]


def test_picture_sets_are_disjoint_and_have_a_picture_in_every_row() -> None:
    files = (CALIBRATION_IMAGES_FILE, EVALUATION_IMAGES_FILE)
    for file in files:
        counts = [sum(1 for _ in vision_parts(row["messages"], "image")) for _, row in read_jsonl(file)]
        assert len(counts) == 128 and counts.count(1) == 96 and counts.count(2) == 32
    calibration, evaluation = (set(pictures_of(file)) for file in files)
    assert len(calibration) == len(evaluation) == 160
    assert not calibration & evaluation


def test_the_builtin_sets_by_name(tmp_path: Path) -> None:
    limits = CalibrationSource(num_samples=6)
    kinds = {name: seen(load_calibration(BUILTIN_MODEL, limits, [name])) for name in ("builtin", "builtin-images", "builtin-mixed")}
    assert kinds == {"builtin": [False] * 6, "builtin-images": [True] * 6, "builtin-mixed": [False, True] * 3}
    named = load_calibration(BUILTIN_MODEL, CalibrationSource(dataset="builtin-mixed", num_samples=6), [])
    assert named.source == "builtin-mixed"
    assert named.identity == load_calibration(BUILTIN_MODEL, limits, ["builtin-mixed"]).identity


def seen(loaded: CalibrationSet) -> list[bool]:
    return [sample.has_pictures for sample in loaded.samples]


def test_several_sources_one_after_another() -> None:
    sources = (
        CalibrationSource(dataset="builtin-images", num_samples=3),
        CalibrationSource(num_samples=2, max_seq_len=20),
    )
    loaded = load_calibration(BUILTIN_MODEL, sources, [])
    assert seen(loaded) == [True] * 3 + [False] * 2
    assert [len(sample.input_ids) for sample in loaded.samples[3:]] == [20, 20]
    record = loaded.record()
    assert (record["source"], record["num_samples"], record["num_truncated"]) == ("builtin-images + builtin", 5, 2)
    assert [part["num_samples"] for part in record["sources"]] == [3, 2]
    alone = load_calibration(BUILTIN_MODEL, sources[0], []).record()
    assert record["sources"][0] == alone and "sources" not in alone


def test_files_stand_for_all_sources_of_a_recipe(tmp_path: Path) -> None:
    for name, count in (("a", 4), ("b", 9)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": "red " * 30}) for _ in range(count)))
    sources = (
        CalibrationSource(dataset="x/y", num_samples=5, max_seq_len=8),
        CalibrationSource(dataset="z", num_samples=6, max_seq_len=16),
    )
    loaded = load_calibration(BUILTIN_MODEL, sources, [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert [len(sample.input_ids) for sample in loaded.samples] == [16] * 11
    assert loaded.source == "a.jsonl, b.jsonl"


def png(color: str, size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def colors(row: dict) -> list[tuple[int, ...]]:
    return [open_image(source, "here").getpixel((0, 0)) for source, _ in vision_parts(row["messages"], "image")]


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.mark.parametrize("decode", [True, False])
def test_picture_columns_are_read_by_the_real_library(decode: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "One."}, {"type": "image", "text": None}]
    pictures = [{"bytes": png("red"), "path": None}, {"bytes": png("blue"), "path": None}]
    column = datasets.Image(decode=decode)
    text = datasets.Value("string")
    features = datasets.Features({"images": datasets.List(column), "messages": [{"role": text, "content": [{"type": text, "text": text}]}]})
    made = datasets.Dataset.from_dict({"images": [pictures], "messages": [[{"role": "user", "content": parts}]]}, features=features)
    (tmp_path / "talk").mkdir()
    made.to_parquet(str(tmp_path / "talk" / "train.parquet"))
    ((_, row),) = read_hub(CalibrationSource(dataset=str(tmp_path / "talk"), num_samples=1))
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text", "image"]
    assert colors(row) == [RED, BLUE]
    features = datasets.Features({"image": column, "question": text, "answer": text})
    made = datasets.Dataset.from_dict({"image": pictures[:1], "question": ["Which color?"], "answer": ["Red."]}, features=features)
    (tmp_path / "asked").mkdir()
    made.to_parquet(str(tmp_path / "asked" / "train.parquet"))
    ((_, row),) = read_hub(CalibrationSource(dataset=str(tmp_path / "asked"), num_samples=5))
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert colors(row) == [RED] and row["messages"][0]["content"][1]["text"] == "Which color?"
    sample = load_calibration(BUILTIN_MODEL, CalibrationSource(dataset=str(tmp_path / "asked"), num_samples=5), []).samples[0]
    assert sample.has_pictures


def test_pictures_in_archives_beside_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of nvidia/Nemotron-VLM-Dataset-v2: rows name their pictures, which lie in SUBSET/media/*.tar."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "set" / "tables"
    (folder / "media").mkdir(parents=True)
    for number, names in enumerate((("a.png", "b.png"), ("c.png",))):
        with tarfile.open(folder / "media" / f"shard_00{number}.tar", "w") as tar:
            for name in names:
                content = png("red" if name == "a.png" else "blue")
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    content = [{"type": "text", "text": "What is it?", "image": None}]
    rows = [
        {"id": name, "messages": [{"role": "user", "content": [{"type": "image", "text": None, "image": name}, *content]}]}
        for name in ("z.png", "c.png", "a.png", "b.png")
    ]
    (folder / "tables.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n- config_name: tables\n  data_files: tables/tables.jsonl\n---\n", encoding="utf-8"
    )
    found = list(read_hub(CalibrationSource(dataset=str(tmp_path / "set"), subset="tables", num_samples=2)))
    assert [colors(row) for _, row in found] == [[BLUE], [RED]]  # of z.png there is no picture


def test_talks_with_marks_for_their_pictures() -> None:
    row = {"image": {"bytes": png("red")}, "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]}
    found = check_row(hub_rows.calibration_row(row), "row 1")
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"]
    assert colors(found) == [RED]
    assert found["messages"][1]["content"] == "A."
    over = hub_rows.calibration_row({"images": [png("blue")], "messages": [{"role": "user", "content": "What?"}]})
    assert colors(over) == [BLUE] and over["messages"][0]["content"][1] == {"type": "text", "text": "What?"}
    assert hub_rows.calibration_row({"article": "News."}) == {"text": "News."}
    with pytest.raises(InputError, match="neither"):
        check_row(hub_rows.calibration_row({"number": 3}), "row 1")


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
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]},
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
    parts += [{"type": "video", "video": ["a.png", "b.png"]}, {"type": "video_url", "video_url": {"url": "a.gif"}}]
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
