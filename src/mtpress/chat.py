"""Messages in, token ids and pixels out: the chat template, the tokenizer and the image processor of one checkpoint.

In: OpenAI-style messages (text, `image_url` parts whose URL is a local path or a data URI, `image` parts that hold a
path or a PIL image) or plain text. Out: `Sample`. Leaves out: video decoding, padding, batching.
"""

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mtpress.errors import InputError

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"


@dataclass
class Sample:
    """One sequence as the model reads it.

    input_ids: int64 [T]. pixel_values: float32 [patches, 3·2·patch·patch] of all images in order, or None.
    image_grid_thw: int64 [images, 3] in patches, or None.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None = None
    image_grid_thw: torch.Tensor | None = None


def open_image(source: Any, where: str) -> Image.Image:
    """The RGB image of a path, data URI or PIL image; InputError names `where` it was asked for."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Mapping):
        source = source.get("url")
    if not isinstance(source, str):
        raise InputError(f"{where}: an image must be a path, a data URI or {{'url': ...}}, got {type(source).__name__}")
    if source.startswith(("http://", "https://")):
        raise InputError(f"{where}: {source[:80]} is a web address; download the image and name its path")
    try:
        if source.startswith("data:"):
            data: Any = io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        else:
            data = Path(source.removeprefix("file://"))
        with Image.open(data) as image:
            return image.convert("RGB")
    except (OSError, binascii.Error, ValueError, Image.DecompressionBombError, SyntaxError) as error:
        raise InputError(f"{where}: image {source[:80]!r} does not open ({str(error)[:120]})") from None


def image_sources(messages: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """The sources of all images of a conversation in order."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if isinstance(part, Mapping) and ("image_url" in part or "image" in part or part.get("type") == "image"):
                    yield part.get("image_url", part.get("image"))


class ChatEncoder:
    """Renders with a checkpoint's own template (in transformers' sandbox) and encodes with its tokenizer."""

    def __init__(self, directory: Path) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, Exception) as error:  # tokenizers raises bare Exception
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise InputError(f"{directory}: its tokenizer does not load ({reason}); check tokenizer.json") from None
        self.directory = directory
        self._image_processor: Qwen2VLImageProcessorPil | None = None

    @property
    def image_processor(self) -> Qwen2VLImageProcessorPil:
        if self._image_processor is None:
            if not (self.directory / "preprocessor_config.json").is_file():
                raise InputError(f"{self.directory}: no preprocessor_config.json, so images cannot be read; copy it from the base")
            self._image_processor = Qwen2VLImageProcessorPil.from_pretrained(str(self.directory), local_files_only=True)
        return self._image_processor

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, **kwargs: Any) -> str:
        """The text of a conversation; `kwargs` (tools, enable_thinking, …) go to the template."""
        try:
            return str(
                self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs)
            )
        except Exception as error:  # jinja's errors share no base with transformers' own
            raise InputError(f"the chat template refuses this conversation: {str(error).splitlines()[0][:160]}") from None

    def encode_text(self, text: str) -> Sample:
        return Sample(torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64))

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, where: str = "messages", add_generation_prompt: bool = False, **kwargs: Any
    ) -> Sample:
        """One conversation as a `Sample`; each image placeholder becomes as many tokens as the image has merged patches."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt, **kwargs)
        images = [open_image(source, where) for source in image_sources(messages)]
        if not images:
            return self.encode_text(text)
        if (found := text.count(IMAGE_TOKEN)) != len(images):
            raise InputError(f"{where}: the template wrote {found} image placeholders for {len(images)} images")
        pixels = self.image_processor(images=images, return_tensors="pt")
        merged = self.image_processor.merge_size**2
        for grid in pixels["image_grid_thw"].tolist():
            text = text.replace(IMAGE_TOKEN, "\0" * (grid[0] * grid[1] * grid[2] // merged), 1)
        sample = self.encode_text(text.replace("\0", IMAGE_TOKEN))
        sample.pixel_values, sample.image_grid_thw = pixels["pixel_values"], pixels["image_grid_thw"]
        return sample
