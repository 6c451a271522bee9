"""Sets, what of them counts, and whether a checkpoint has seen them."""

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mtpress import builtin
from mtpress.builtin import BUILTIN_MODEL
from mtpress.calibration.samples import read_jsonl
from mtpress.chat.encoder import ChatEncoder
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.errors import InputError
from mtpress.evaluation.documents import ALL, Documents, check_disjoint, content_key, load
from mtpress.stages.quantize import quantize

CONFIG = Checkpoint.open(BUILTIN_MODEL).config


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(BUILTIN_MODEL)


def data_uri(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_row(colour: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": data_uri(colour)}}, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": f"A {colour} square."}]}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_predictions_of_image_placeholders_do_not_count(encoder: ChatEncoder, tmp_path: Path) -> None:
    found = load(encoder, CONFIG, [write(tmp_path / "a.jsonl", picture_row("red"), {"text": "two words"})], 2048)
    ids, counted = found.samples[0].input_ids, found.counted[0]
    placeholder = ids == CONFIG["image_token_id"]
    assert int(placeholder.sum()) > 1
    assert torch.equal(counted, ~placeholder[1:]) and found.with_images == [True, False]
    assert bool(found.counted[1].all()) and len(found.counted[1]) == len(found.samples[1].input_ids) - 1


def test_sets_and_kinds_are_reported_apart(encoder: ChatEncoder, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {"text": "some words"}, picture_row("red"))
    two = write(tmp_path / "two.jsonl", {"text": "other words"}, {"text": "x"}, {"text": "more words"})
    found = load(encoder, CONFIG, [one, two], 2048)
    assert found.groups() == {
        ALL: [0, 1, 2, 3], "one": [0, 1], "two": [2, 3], "text": [0, 2, 3], "with images": [1]
    }  # fmt: skip
    assert load(encoder, CONFIG, [two], 2048).groups() == {ALL: [0, 1]}
    assert load(encoder, CONFIG, [one, two], 2048, limit=1).sizes().keys() == {"one", "two"}
    assert [held["num_documents"] for held in found.sizes().values()] == [2, 2]  # one token predicts nothing
    with pytest.raises(InputError, match="named twice"):
        load(encoder, CONFIG, [one, one], 2048)
    with pytest.raises(InputError, match="holds no document"):
        load(encoder, CONFIG, [write(tmp_path / "no.jsonl", {"text": "x"})], 2048)


def test_texts_are_cut_and_pictures_are_not(encoder: ChatEncoder, tmp_path: Path) -> None:
    found = load(encoder, CONFIG, [write(tmp_path / "a.jsonl", {"text": "so it goes on and on and on"})], 4)
    assert found.lengths == [4] and found.num_truncated == 1
    with pytest.raises(InputError, match="raise it"):
        load(encoder, CONFIG, [write(tmp_path / "b.jsonl", picture_row("red"))], 4)


def test_a_key_is_of_the_content_alone(tmp_path: Path) -> None:
    picture = picture_row("red")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    by_path = json.loads(json.dumps(picture))
    by_path["messages"][0]["content"][0] = {"type": "image", "image": str(tmp_path / "red.png")}
    assert content_key(picture, "x") == content_key(by_path, "x") != content_key(picture_row("blue"), "x")
    in_parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]}
    assert content_key(in_parts, "x") == content_key({"messages": [{"role": "user", "content": "hello"}]}, "x")
    assert content_key({"text": " a "}, "x") == content_key({"text": "a"}, "x") != content_key({"text": "b"}, "x")


def test_the_built_in_sets_share_no_document() -> None:
    keys = [{content_key(row, where) for where, row in read_jsonl(path)} for path in (builtin.EVALUATION_FILE, builtin.CALIBRATION_FILE)]
    assert all(len(of) > 100 for of in keys)
    assert not keys[0] & keys[1]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A checkpoint and the file that it was calibrated on."""
    folder = tmp_path_factory.mktemp("calibrated")
    file = write(folder / "mine.jsonl", {"text": "one and one is two"}, {"text": "two and two is four"})
    quantize(BUILTIN_MODEL, folder / "out", "nvfp4-mtp-vlm", calibration=[file], silent=True)
    return folder / "out", file


def loaded(encoder: ChatEncoder, path: str) -> Documents:
    return load(encoder, CONFIG, [path], 2048)


def test_what_a_checkpoint_was_calibrated_on_is_known_by_its_hash(
    encoder: ChatEncoder, calibrated: tuple[Path, str], tmp_path: Path
) -> None:
    path, file = calibrated
    documents = loaded(encoder, write(tmp_path / "a.jsonl", {"text": "three and three is six"}))
    checkpoint = Checkpoint.open(path)
    known = check_disjoint(documents, checkpoint, [file])
    assert (known.shared, known.known) == (0, True) and "by its SHA-256" in known.said
    unknown = check_disjoint(documents, checkpoint, [])
    assert (unknown.shared, unknown.known) == (0, False) and "mine.jsonl" in unknown.said and "--calibration" in unknown.said
    unrecorded = Path(shutil.copytree(path, tmp_path / "unrecorded"))
    (unrecorded / "mtpress.json").unlink()
    assert "not recorded" in check_disjoint(documents, Checkpoint.open(unrecorded), [file]).said
    again = loaded(encoder, write(tmp_path / "b.jsonl", {"text": "two and two is four"}, {"text": "three and three is six"}))
    found = check_disjoint(again, checkpoint, [file])
    assert found.shared == 1 and found.said.startswith("1 of 2 documents are in")
