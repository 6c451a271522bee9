"""The chat template, the tokenizer and pictures under limits; pictures in their places."""

import io
import resource
import signal
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat import images
from mtpress.chat import template as templating
from mtpress.chat.encoder import IMAGE_TOKEN, ChatEncoder
from mtpress.chat.images import open_image
from mtpress.errors import InputError

TALK = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(BUILTIN_MODEL)


def with_template(encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch, template: str) -> ChatEncoder:
    monkeypatch.setattr(encoder.tokenizer, "chat_template", template)
    return encoder


def test_a_template_without_end_is_ended(encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templating, "MAX_RENDER_SECONDS", 0.2)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    for template in (loop, "{{ 7 ** (10 ** 10) }}"):  # Jinja works the second out before it renders
        with pytest.raises(InputError, match=r"^line 3: the chat template ran for .* loop without end"):
            with_template(encoder, monkeypatch, template).render(TALK, where="line 3")
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_that_wants_all_memory_gets_none(encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    for template in ("{{ 'a' * 10 ** 10 }}", "{{ 'a'.ljust(2000000000) }}"):
        with pytest.raises(InputError, match="wants over 400 MB"):
            with_template(encoder, monkeypatch, template).render(TALK)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    with pytest.raises(InputError, match=r"5,000,000 characters, over 4,000,000; split it"):
        with_template(encoder, monkeypatch, "{{ 'a' * 5000000 }}").encode(TALK)


def test_outside_the_main_thread_templates_render_without_a_clock(encoder: ChatEncoder) -> None:
    rendered: list[str] = []
    thread = threading.Thread(target=lambda: rendered.append(encoder.render(TALK)))
    thread.start()
    thread.join()
    assert rendered == [encoder.render(TALK)]


def test_half_of_a_surrogate_pair_is_no_text(encoder: ChatEncoder) -> None:
    for text in ("a\ud800", "\udfff"):
        with pytest.raises(InputError, match=r"^line 7: holds half of a surrogate pair"):
            encoder.encode_text(text, where="line 7")
    assert len(encoder.encode_text("\U0001f600").input_ids) > 0


def test_a_zero_character_is_not_a_picture(encoder: ChatEncoder) -> None:
    picture = Image.new("RGB", (64, 64))
    part = {"type": "image", "image": picture}
    plain, zero = (encoder.encode([{"role": "user", "content": [part, {"type": "text", "text": t}]}]) for t in ("ab", "a\0b"))
    token = encoder.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert plain.image_grid_thw is not None
    merged = int(plain.image_grid_thw.prod()) // 4
    assert int((plain.input_ids == token).sum()) == int((zero.input_ids == token).sum()) == merged
    assert plain.pixel_values is not None and zero.pixel_values is not None
    assert torch.equal(plain.pixel_values, zero.pixel_values)


def encoded(kind: str, size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, kind)
    return file.getvalue()


def test_pictures_that_do_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.eps").write_bytes(encoded("EPS"))
    (tmp_path / "torn.png").write_bytes(encoded("PNG")[:40])
    (tmp_path / "wide.png").write_bytes(encoded("PNG", (40, 30)))
    monkeypatch.setattr(images, "MAX_PICTURE_PIXELS", 1000)
    for name, word in (
        ("a.eps", "cannot identify"),
        ("torn.png", "does not open"),
        ("wide.png", "40×30 pixels are over"),
        ("", "not a file"),
    ):
        with pytest.raises(InputError, match=word):
            open_image(str(tmp_path / name), "line 1")
    (tmp_path / "sound.png").write_bytes(encoded("PNG"))
    assert open_image(str(tmp_path / "sound.png"), "line 1").size == (8, 8)


def test_a_picture_that_the_processor_refuses(encoder: ChatEncoder) -> None:
    thin = {"type": "image", "image": Image.new("RGB", (1, 1000))}
    with pytest.raises(InputError, match=r"^line 2: the image processor refuses an image \(.*ratio"):
        encoder.encode([{"role": "user", "content": [thin]}], where="line 2")


@pytest.mark.parametrize(
    ("file", "old", "new", "word"),
    [
        ("config.json", '"image_token_id": 1229', '"image_token_id": 5', "image_token_id '5', the tokenizer 1229"),
        ("config.json", '"patch_size": 16', '"patch_size": 8', "patch_size '16', config.json's vision_config patch_size '8'"),
        ("preprocessor_config.json", '"merge_size": 2', '"merge_size": 0', "merge_size '0'"),
        ("preprocessor_config.json", "{", "[", "does not load"),
        ("preprocessor_config.json", '"image_std": [\n    0.5', '"image_std": [\n    0', "image_std is"),
    ],
)
def test_processor_and_tower_of_two_models(file: str, old: str, new: str, word: str, tmp_path: Path) -> None:
    for path in BUILTIN_MODEL.iterdir():
        if path.suffix in (".json", ".jinja"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    encoder = ChatEncoder(tmp_path)
    assert encoder.encode(TALK).pixel_values is None  # without pictures nothing of this matters
    with pytest.raises(InputError) as raised:
        encoder.encode([{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (64, 64))}]}])
    assert word in str(raised.value)
