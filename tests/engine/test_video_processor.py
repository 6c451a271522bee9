"""Videos against transformers' own processor, which needs torchvision: the same tokens, the same pixels, bit for bit."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from mtpress.builtin import BUILTIN_MODEL
from mtpress.chat.encoder import ChatEncoder

pytestmark = pytest.mark.engine
SCRIPT = Path(__file__).with_name("video_processor.py")
# frames, width, height, milliseconds a frame; None: a list of pictures, two a second
VIDEOS = [
    (7, 96, 64, 100),
    (13, 100, 50, 70),
    (30, 200, 130, 40),
    (9, 640, 480, 500),
    (2, 64, 64, None),
    (5, 40, 30, None),
    (3, 300, 200, None),
]


def draw(number: int, width: int, height: int) -> Image.Image:
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    ImageDraw.Draw(image).ellipse((number * 3, 5, number * 3 + 20, 25), fill=(200, 30, 5 * number))
    return image


def test_tokens_and_pixels_are_those_of_transformers(engine_python: Path, tmp_path: Path) -> None:
    encoder, samples, request = ChatEncoder(BUILTIN_MODEL), [], []
    for number, (count, width, height, milliseconds) in enumerate(VIDEOS):
        frames = [draw(i, width, height) for i in range(count)]
        files = [str(tmp_path / f"{number}-{i}.png") for i in range(count)]
        for frame, file in zip(frames, files, strict=True):
            frame.save(file)
        source: object = files
        if milliseconds:
            source = str(tmp_path / f"{number}.webp")
            frames[0].save(source, save_all=True, append_images=frames[1:], duration=milliseconds, lossless=True)
        messages = [{"role": "user", "content": [{"type": "video", "video": source}, {"type": "text", "text": "What moves?"}]}]
        samples.append(encoder.encode(messages))
        fps = 1000 / milliseconds if milliseconds else 2
        request.append({"text": encoder.render(messages), "frames": files, "fps": fps, "sampled": milliseconds is None})
    (tmp_path / "request.json").write_text(json.dumps(request), encoding="utf-8")
    command = [str(engine_python), str(SCRIPT), str(BUILTIN_MODEL), str(tmp_path / "request.json"), str(tmp_path / "answers.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    answers = load_file(tmp_path / "answers.safetensors")
    token = encoder.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    for number, sample in enumerate(samples):
        assert torch.equal(sample.input_ids, answers[f"{number}.input_ids"][0])
        assert torch.equal(2 * (sample.input_ids == token), answers[f"{number}.mm_token_type_ids"][0])
        assert sample.video_grid_thw is not None and torch.equal(sample.video_grid_thw, answers[f"{number}.video_grid_thw"])
        assert sample.pixel_values_videos is not None
        assert torch.equal(sample.pixel_values_videos, answers[f"{number}.pixel_values_videos"])
    assert len({tuple(sample.video_grid_thw[0].tolist()) for sample in samples}) >= 5  # type: ignore[index]
