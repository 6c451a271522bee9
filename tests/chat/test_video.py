"""Videos: which frames are taken and when they are seen, and what cannot be read, in one line. tests/engine/test_video_processor.py holds
pixels and tokens against transformers' own processor."""

import base64
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import video_utils

from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat import video
from mtpress.chat.encoder import VIDEO_TOKEN, ChatEncoder
from mtpress.errors import InputError


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(BUILTIN_MODEL)


def grey(number: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (8 * number,) * 3)


def animation(path: Path, count: int, milliseconds: int) -> str:
    frames = [grey(number) for number in range(count)]
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, **lossless)
    return str(path)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_is_sampled_at_its_own_times(ending: str, encoder: ChatEncoder, tmp_path: Path) -> None:
    found = video.open_video(animation(tmp_path / f"a.{ending}", 20, 250), encoder.video_processor, "line 1")
    shown = [int(frame[0, 0, 0]) // 8 for frame in found.frames]
    assert shown == [0, 2, 4, 6, 8, 11, 13, 15, 17, 19]  # five seconds, two frames a second
    assert found.seconds == pytest.approx([number * 0.25 for number in shown])


def test_a_list_of_pictures_is_taken_whole(encoder: ChatEncoder, tmp_path: Path) -> None:
    for number in range(3):
        grey(number).save(tmp_path / f"{number}.png")
    sources = [str(tmp_path / "0.png"), {"url": str(tmp_path / "1.png")}, grey(2)]
    assert video.open_video(sources, encoder.video_processor, "line 1").seconds == [0.0, 0.5, 1.0]
    found = video.open_video(sources, encoder.video_processor, "line 1", 10)
    assert found.seconds == [0.0, 0.1, 0.2]
    assert [int(frame[0, 0, 0]) for frame in found.frames] == [0, 8, 16]


def test_a_data_uri(encoder: ChatEncoder, tmp_path: Path) -> None:
    path = Path(animation(tmp_path / "a.gif", 6, 500))
    uri = f"data:image/gif;base64,{base64.b64encode(path.read_bytes()).decode()}"
    one, other = (video.open_video({"url": source}, encoder.video_processor, "line 1") for source in (uri, str(path)))
    assert torch.equal(one.frames, other.frames) and one.seconds == other.seconds


def test_placeholders_and_times(encoder: ChatEncoder, tmp_path: Path) -> None:
    part = {"type": "video", "video": [grey(number) for number in range(5)], "fps": 1}
    sample = encoder.encode([{"role": "user", "content": [part, {"type": "text", "text": "a"}]}])
    assert sample.video_grid_thw is not None and sample.video_grid_thw.tolist() == [[3, 4, 4]]
    assert sample.pixel_values is None and sample.has_pictures
    text = encoder.tokenizer.decode(sample.input_ids)
    assert all(f"<{second} seconds><|vision_start|>{VIDEO_TOKEN * 4}<|vision_end|>" in text for second in ("0.5", "2.5", "4.0"))
    assert text.count(VIDEO_TOKEN) == 12


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("one.gif", "has a single frame; a picture is an image"),
        ("nothing.gif", "is not a file"),
        ("torn.gif", "does not open"),
        ("film.mp4", "needs a decoder: pip install av; or name its frames"),
        ("https://a.b/c.gif", "is a web address"),
        ("data:video/mp4;base64,AAAA", "is a film in a data URI; save it and name its path"),
        ("data:image/gif;base64,!", "does not open"),
        (3, "must be a path, a data URI or a list of images, got int"),
        ([], "a video of 0 frames; it needs two or more"),
        (["sound.png", "nothing.png"], "frame 2: image"),
        (["sound.png", "wide.png"], "frame 2 is 40×30, frame 1 is 64×64; make them equal"),
    ],
)
def test_what_is_no_video(source, words: str, encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    grey(1).save(tmp_path / "one.gif")
    grey(1).save(tmp_path / "sound.png")
    grey(1, (40, 30)).save(tmp_path / "wide.png")
    (tmp_path / "torn.gif").write_bytes(Path(animation(tmp_path / "a.gif", 5, 100)).read_bytes()[:30])
    (tmp_path / "film.mp4").write_bytes(b"\0" * 40)
    named = str(tmp_path / source) if isinstance(source, str) and "." in source and ":" not in source else source
    named = [str(tmp_path / name) for name in source] if isinstance(source, list) else named
    with pytest.raises(InputError) as raised:
        encoder.encode([{"role": "user", "content": [{"type": "video", "video": named}]}], where="line 7")
    assert str(raised.value).startswith("line 7: ") and words in str(raised.value) and "\n" not in str(raised.value)


def test_limits(encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = animation(tmp_path / "a.gif", 10, 500)
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 9 * 64 * 64)
    for source in (path, [grey(number) for number in range(10)]):
        with pytest.raises(InputError, match=r"^line 1: .*is 10 frames of 64×64 pixels, over 36,864 together; make it smaller"):
            video.open_video(source, encoder.video_processor, "line 1")
    monkeypatch.setattr(video, "MAX_VIDEO_FRAMES", 9)
    with pytest.raises(InputError, match="has 10 frames, over 9"):
        video.open_video(path, encoder.video_processor, "line 1")
    for fps in (0, True, "2", float("nan"), 5000):
        with pytest.raises(InputError, match="fps of a video must be a number"):
            video.open_video(path, encoder.video_processor, "line 1", fps)


def test_a_film_is_decoded_by_what_is_installed(encoder: ChatEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' load_video does it; here a decoder stands in, for the project installs none."""

    def load_video(path: str, backend: str, sample_indices_fn) -> tuple[np.ndarray, video_utils.VideoMetadata]:
        assert backend == "pyav"
        metadata = video_utils.VideoMetadata(total_num_frames=40, fps=8.0, width=32, height=16)
        metadata.frames_indices = sample_indices_fn(metadata=metadata)
        return np.stack([np.full((16, 32, 3), i, np.uint8) for i in metadata.frames_indices]), metadata

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace() if name == "av" else None)
    monkeypatch.setattr(video_utils, "load_video", load_video)
    (tmp_path / "a.mp4").touch()
    found = video.open_video(str(tmp_path / "a.mp4"), encoder.video_processor, "line 1")
    assert found.frames.shape == (10, 3, 16, 32)
    assert found.seconds == [float(frame[0, 0, 0]) / 8 for frame in found.frames]
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 9 * 16 * 32)
    with pytest.raises(InputError, match="is 10 frames of 32×16 pixels"):
        video.open_video(str(tmp_path / "a.mp4"), encoder.video_processor, "line 1")


def test_a_checkpoint_without_a_video_processor(tmp_path: Path) -> None:
    for path in BUILTIN_MODEL.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.startswith("video"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"no video_preprocessor_config\.json, so videos cannot be read"):
        ChatEncoder(tmp_path).encode([{"role": "user", "content": [{"type": "video", "video": [grey(1), grey(2)]}]}])
    config = (BUILTIN_MODEL / "video_preprocessor_config.json").read_text()
    (tmp_path / "video_preprocessor_config.json").write_text(config.replace('"patch_size": 16', '"patch_size": 8', 1))
    with pytest.raises(InputError, match=r"video_preprocessor_config\.json has patch_size '8'"):
        ChatEncoder(tmp_path).encode([{"role": "user", "content": [{"type": "video", "video": [grey(1), grey(2)]}]}])
