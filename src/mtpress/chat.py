"""Messages in, token ids and pixels out: the chat template, the tokenizer and the image processor of one checkpoint.

In: OpenAI-style messages (text, `image_url` parts whose URL is a local path or a data URI, `image` parts that hold a
path or a PIL image) or plain text. Out: `Sample`. Leaves out: video decoding, padding, batching.

Templates, tokenizers and pictures come from strangers: each is held to limits of time, memory or size.
"""

import base64
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer

from mtpress.checkpoint import read_json_object
from mtpress.errors import InputError
from mtpress.messages import CONTROL_TOKENS, FORMAT_WORDS, MODE_TAGS, normalize_messages, part_kind
from mtpress.templating import reason, refusals

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow would hand others to programs of the system
MAX_PICTURE_PIXELS = 50_000_000
MAX_TEXT_CHARS = 4_000_000  # of one sample; the longest sequence of a recipe has a million tokens
IMAGE_TOKEN = "<|image_pad|>"


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
            if data.exists() and not data.is_file():
                raise ValueError("it is not a file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that are refused here
            with Image.open(data, formats=PICTURE_FORMATS) as image:
                if image.width * image.height > MAX_PICTURE_PIXELS:
                    raise ValueError(f"{image.width}×{image.height} pixels are over {MAX_PICTURE_PIXELS:,}; make it smaller")
                return image.convert("RGB")
    except Exception as error:  # decoders of damaged pictures raise errors of every kind
        raise InputError(f"{where}: image {source[:80]!r} does not open ({reason(error)[:120]})") from None


def image_sources(messages: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """The sources of all images of a conversation in order."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part_kind(part) == "image":
                yield part["image"] if part.get("image") is not None else part.get("image_url")


class ChatEncoder:
    """Renders with a checkpoint's own template (in transformers' sandbox), or the one given, and encodes with its tokenizer."""

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises bare Exception
            raise InputError(f"{directory}: its tokenizer does not load ({reason(error)}); check tokenizer.json") from None
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self.directory = directory
        added = self.tokenizer.added_tokens_decoder.values()
        own = (token.content for token in added if len(token.content) > 1 and (token.special or token.content.startswith("<|")))
        self.control_tokens = tuple(dict.fromkeys(token for token in (*CONTROL_TOKENS, *own) if token not in (*FORMAT_WORDS, *MODE_TAGS)))
        self._image_processor: Any = None

    @property
    def image_processor(self) -> Any:
        if self._image_processor is None:
            if not (self.directory / "preprocessor_config.json").is_file():
                raise InputError(f"{self.directory}: no preprocessor_config.json, so images cannot be read; copy it from the base")
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # only for pictures

            try:
                processor = Qwen2VLImageProcessorPil.from_pretrained(str(self.directory), local_files_only=True)
            except Exception as error:  # transformers validates with exceptions of many kinds
                raise InputError(
                    f"{self.directory}: preprocessor_config.json does not load ({reason(error)}); copy it from the base"
                ) from None
            self._refuse_other_tower(processor)
            self._image_processor = processor
        return self._image_processor

    def _refuse_other_tower(self, processor: Any) -> None:
        """The processor cuts the patches that config.json's tower takes, and both mean the same token."""
        config = read_json_object(self.directory / "config.json")
        vision = config.get("vision_config")
        for key, mine in (
            ("patch_size", "patch_size"),
            ("temporal_patch_size", "temporal_patch_size"),
            ("spatial_merge_size", "merge_size"),
        ):
            calls_for, has = vision.get(key) if isinstance(vision, Mapping) else None, getattr(processor, mine, None)
            if type(has) is not int or has < 1 or has != calls_for:
                raise InputError(
                    f"{self.directory}: preprocessor_config.json has {mine} {str(has)[:40]!r}, config.json's vision_config {key} "
                    f"{str(calls_for)[:40]!r}; copy both from the base"
                )
        token = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        said = config.get("image_token_id")
        if type(said) is not int or said != token:
            raise InputError(
                f"{self.directory}: config.json has image_token_id {str(said)[:40]!r}, the tokenizer {token} for {IMAGE_TOKEN}; "
                "copy both from the base"
            )

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, where: str = "messages", **kwargs: Any
    ) -> str:
        """The text of a conversation; `kwargs` (tools, enable_thinking, …) go to the template."""
        normal = normalize_messages(messages, where=where, control_tokens=self.control_tokens)
        with refusals(where):
            return str(self.tokenizer.apply_chat_template(normal, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs))

    def encode_text(self, text: str, *, where: str = "text") -> Sample:
        if len(text) > MAX_TEXT_CHARS:
            raise InputError(f"{where}: {len(text):,} characters, over {MAX_TEXT_CHARS:,}; split it")
        try:
            return Sample(torch.tensor(self.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64))
        except TypeError:  # JSON can spell half of a surrogate pair, which is no text
            if text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text):
                raise
            raise InputError(f"{where}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; take it out") from None

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, where: str = "messages", add_generation_prompt: bool = False, **kwargs: Any
    ) -> Sample:
        """One conversation as a `Sample`; each image placeholder becomes as many tokens as the image has merged patches.

        Control tokens that are typed in text are not tokens here (messages.py), and no placeholders: only parts are pictures.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt, where=where, **kwargs)
        images = [open_image(source, where) for source in image_sources(messages)]
        if not images:
            return self.encode_text(text, where=where)
        if (found := text.count(IMAGE_TOKEN)) != len(images):
            raise InputError(f"{where}: the template wrote {found} image placeholders for {len(images)} images")
        processor = self.image_processor
        try:
            pixels = processor(images=images, return_tensors="pt")
        except Exception as error:  # it refuses pictures of odd sides by more than one library's errors
            raise InputError(f"{where}: the image processor refuses an image ({reason(error)}); take another") from None
        first, *others = text.split(IMAGE_TOKEN)
        for grid, rest in zip(pixels["image_grid_thw"].tolist(), others, strict=True):
            first += IMAGE_TOKEN * (grid[0] * grid[1] * grid[2] // processor.merge_size**2) + rest
        sample = self.encode_text(first, where=where)
        sample.pixel_values, sample.image_grid_thw = pixels["pixel_values"], pixels["image_grid_thw"]
        return sample
