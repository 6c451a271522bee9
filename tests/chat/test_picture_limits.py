"""Pictures of strangers: what they would cost is known before it is paid."""

import io
import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mtpress.builtin import BUILTIN_DIR
from mtpress.chat import picture_limits, video
from mtpress.chat.encoder import ChatEncoder
from mtpress.chat.images import open_image
from mtpress.chat.picture_limits import limits, opened, refuse_processor
from mtpress.chat.video import open_video
from mtpress.errors import InputError

TINY = BUILTIN_DIR / "mtpress-tiny"


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(TINY)


def gif(width: int, height: int, count: int, later: tuple[int, int] | None = None) -> bytes:
    """A GIF of `count` frames of one pixel each, some 20 bytes each, on any canvas. later: what the last one says that it is."""
    frame = b"\x2c" + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    end = b"\x2c" + struct.pack("<4HB", 0, 0, *later, 0) + b"\x02\x02\x44\x01\x00" if later else b""
    head = b"GIF89a" + struct.pack("<2H3B", width, height, 0x80, 0, 0) + b"\x00\x00\x00\xff\xff\xff"
    return head + frame * count + end + b"\x3b"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gif(7000, 7000, 200), "has 9,800,000,000 pixels in its 200 frames"),
        (gif(1, 1, 200_000), "has 200,000 frames, over 100,000"),
        (gif(1, 1, 3, later=(9000, 9000)), "has a frame of 9000×9000 on a canvas of 1×1"),
    ],
)
def test_animations_are_counted_before_they_are_decoded(content: bytes, said: str, encoder: ChatEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(content)
    with pytest.raises(InputError, match=said):
        open_video(str(tmp_path / "a.gif"), encoder.video_processor, "line 1")


def test_a_count_without_end_is_ended(encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_COUNT_SECONDS", 0.05)
    (tmp_path / "a.gif").write_bytes(gif(1, 1, 300_000))
    with pytest.raises(InputError, match="more frames than can be counted"):
        open_video(str(tmp_path / "a.gif"), encoder.video_processor, "line 1")


def png(side: int) -> bytes:
    made = io.BytesIO()
    Image.new("L", (side, side)).save(made, "PNG")
    return made.getvalue()


def test_a_picture_that_stands_sixty_times_is_decoded_once(tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    Path(path).write_bytes(png(6000))
    asked = []

    def count(source: Any, where: str) -> Image.Image:
        asked.append(source)
        return open_image(source, where)

    assert len(opened([path] * 60, "line 1", count)) == 60
    assert len(asked) == 1


def test_a_row_has_limits(tmp_path: Path, encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(64 + number))
        paths.append(str(tmp_path / f"{number}.png"))
    monkeypatch.setattr(picture_limits, "MAX_ROW_PIXELS", 10_000)
    with pytest.raises(InputError, match="line 1: its pictures have over 10,000 pixels together"):
        opened(paths, "line 1", open_image)
    monkeypatch.undo()
    message = {"role": "user", "content": [{"type": "image", "image": paths[0]}] * 60}
    assert encoder.encode([message]).has_pictures
    monkeypatch.setattr(picture_limits, "MAX_RESIZED_PIXELS", 50 * 64 * 64)
    with pytest.raises(InputError, match="become over 204,800 pixels together"):
        encoder.encode([message])


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 4_000_000_000, "longest_edge": 4_000_000_000},
        {"shortest_edge": 4096, "longest_edge": 10**30},
        {"shortest_edge": 4096, "longest_edge": 1024},
        {"shortest_edge": -1, "longest_edge": 1024},
        {"shortest_edge": None, "longest_edge": "x"},
        {"shortest_edge": float("inf"), "longest_edge": 1024},
    ],
)
def test_a_processor_that_asks_for_too_much(size: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="p: size"):
        refuse_processor(SimpleNamespace(patch_size=16, merge_size=2, temporal_patch_size=2, size=size), "p")


@pytest.mark.parametrize("file", ["preprocessor_config.json", "video_preprocessor_config.json"])
def test_such_a_processor_in_a_checkpoint(file: str, tmp_path: Path, encoder: ChatEncoder) -> None:
    assert limits(encoder.image_processor) == (4096, 262144)
    folder = shutil.copytree(TINY, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / file).read_text())
    config["size"] = {"shortest_edge": 4_000_000_000, "longest_edge": 4_000_000_000}
    (folder / file).write_text(json.dumps(config))
    odd = ChatEncoder(folder)
    with pytest.raises(InputError, match=f"{file}: size asks for 4,000,000,000"):
        _ = odd.image_processor if file.startswith("pre") else odd.video_processor
