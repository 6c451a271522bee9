"""Messages in, token ids and pixels out: the chat template, the tokenizer and the image processor of one checkpoint.

In: OpenAI-style messages (text, `image_url` parts whose URL is a local path or a data URI, `image` parts that hold a
path, a PIL image or a file's bytes, `video` parts) or plain text. Out: `Sample`. Leaves out: frames of videos (chat/video.py), padding,
batching.

Templates, tokenizers and pictures come from strangers: each is held to limits of time, memory or size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer

from mtpress.chat.conformance import rendered
from mtpress.chat.images import open_image
from mtpress.chat.messages import CONTROL_TOKENS, FORMAT_WORDS, MODE_TAGS, normalize_messages, vision_parts
from mtpress.chat.picture_limits import MAX_PATCH, opened, refuse_processor, refuse_resized
from mtpress.chat.processor_files import PROCESSOR, problems
from mtpress.chat.sample import Sample
from mtpress.chat.template import reason, refusals
from mtpress.chat.tokenizer_trial import refuse_hostile
from mtpress.checkpoint.json_files import read_json_object
from mtpress.errors import InputError

MAX_TEXT_CHARS = 4_000_000  # of one sample; the longest sequence of a recipe has a million tokens
IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"


class ChatEncoder:
    """Renders with a checkpoint's own template (in transformers' sandbox), or the one given, and encodes with its tokenizer."""

    def __init__(self, directory: Path, chat_template: str | None = None) -> None:
        refuse_hostile(directory)
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
        self._video_processor: Any = None

    @property
    def image_processor(self) -> Any:
        if self._image_processor is None:
            from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # only for pictures

            self._image_processor = self._processor(Qwen2VLImageProcessorPil, "preprocessor_config.json", "images", IMAGE_TOKEN)
        return self._image_processor

    @property
    def video_processor(self) -> Any:
        """transformers' own, for its settings and its choice of frames; without torchvision it makes no pixels, chat/video.py does."""
        if self._video_processor is None:
            from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

            self._video_processor = self._processor(Qwen3VLVideoProcessor, "video_preprocessor_config.json", "videos", VIDEO_TOKEN)
        return self._video_processor

    def _processor(self, kind: Any, file: str, what: str, token: str) -> Any:
        if not (self.directory / file).is_file():
            whole = self.directory / PROCESSOR  # transformers 5 writes this one alone, and reads it first
            if not whole.is_file() or not isinstance(read_json_object(whole).get(f"{what.removesuffix('s')}_processor"), Mapping):
                raise InputError(f"{self.directory}: no {file}, so {what} cannot be read; copy it from the base")
            file = PROCESSOR
        try:
            processor = kind.from_pretrained(str(self.directory), local_files_only=True)
        except Exception as error:  # transformers validates with exceptions of many kinds
            raise InputError(f"{self.directory}: {file} does not load ({reason(error)}); copy it from the base") from None
        self._refuse_other_tower(processor, file, token)
        refuse_processor(processor, str(self.directory / file))
        if (problem := next(problems(vars(processor)), None)) is not None:
            raise InputError(f"{self.directory}: {file}: {problem}, so every picture would be NaN; copy it from the base")
        return processor

    def _refuse_other_tower(self, processor: Any, file: str, token: str) -> None:
        """The processor cuts the patches that config.json's tower takes, and both mean the same token."""
        config = read_json_object(self.directory / "config.json")
        vision = config.get("vision_config")
        for key, mine in (
            ("patch_size", "patch_size"),
            ("temporal_patch_size", "temporal_patch_size"),
            ("spatial_merge_size", "merge_size"),
        ):
            calls_for, has = vision.get(key) if isinstance(vision, Mapping) else None, getattr(processor, mine, None)
            if type(has) is not int or not 1 <= has <= MAX_PATCH or has != calls_for:
                raise InputError(
                    f"{self.directory}: {file} has {mine} {str(has)[:40]!r}, config.json's vision_config {key} "
                    f"{str(calls_for)[:40]!r}; copy both from the base"
                )
        key = "image_token_id" if token == IMAGE_TOKEN else "video_token_id"
        knows, said = self.tokenizer.convert_tokens_to_ids(token), config.get(key)
        if type(said) is not int or said != knows:
            raise InputError(
                f"{self.directory}: config.json has {key} {str(said)[:40]!r}, the tokenizer {knows} for {token}; copy both from the base"
            )

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, where: str = "messages", **kwargs: Any
    ) -> str:
        """The text of a conversation; `kwargs` (tools, enable_thinking, …) go to the template."""
        normal = normalize_messages(messages, where=where, control_tokens=self.control_tokens)
        tools = kwargs.pop("tools", None)
        with refusals(where):
            text = str(self.tokenizer.get_chat_template(tools=tools))
        variables = {**self.tokenizer.special_tokens_map, **kwargs, "add_generation_prompt": add_generation_prompt}
        return rendered(text, normal, tools, where=where, **variables)

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
        """One conversation as a `Sample`; each placeholder becomes as many tokens as its image or video has merged patches.

        Control tokens that are typed in text are not tokens here (chat/messages.py), and no placeholders: only parts are pictures.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt, where=where, **kwargs)
        images = opened([source for source, _ in vision_parts(messages, "image")], where, open_image)
        pixels: dict[str, torch.Tensor] = {}
        if images:
            text, pixels = self._with_images(text, images, where)
        if videos := list(vision_parts(messages, "video")):
            text, pixels_videos = self._with_videos(text, videos, where)
            pixels |= pixels_videos
        sample = self.encode_text(text, where=where)
        return replace(sample, **pixels)

    def _with_images(self, text: str, images: Sequence[Image.Image], where: str) -> tuple[str, dict[str, torch.Tensor]]:
        """The text with the placeholders of all images, and what a Sample holds of them."""
        places = _places(text, IMAGE_TOKEN, len(images), "image", where)
        processor = self.image_processor
        refuse_resized(images, processor, where)
        try:
            found = processor(images=images, return_tensors="pt")
        except Exception as error:  # it refuses pictures of odd sides by more than one library's errors
            raise InputError(f"{where}: the image processor refuses an image ({reason(error)}); take another") from None
        tokens = (IMAGE_TOKEN * (math.prod(grid) // processor.merge_size**2) for grid in found["image_grid_thw"].tolist())
        return _filled(places, tokens), {key: found[key] for key in ("pixel_values", "image_grid_thw")}

    def _with_videos(self, text: str, videos: Sequence[tuple[Any, Mapping[str, Any]]], where: str) -> tuple[str, dict[str, torch.Tensor]]:
        """The same for videos, one after another: each is a good deal of memory."""
        from mtpress.chat import video

        places = _places(text, VIDEO_TOKEN, len(videos), "video", where)
        tokens, pixels, grids = [], [], []
        for source, part in videos:
            opened = video.open_video(source, self.video_processor, where, part.get("fps"))
            try:
                made, grid = video.patches(opened.frames, self.video_processor)
            except Exception as error:
                raise InputError(f"{where}: the video processor refuses a video ({reason(error)}); take another") from None
            tokens.append(video.placeholders(opened.seconds, grid, self.video_processor))
            pixels.append(made)
            grids.append(grid)
        return _filled(places, tokens), {"pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.cat(grids)}


def _places(text: str, token: str, count: int, kind: str, where: str) -> list[str]:
    """The text, cut at the placeholders of one kind."""
    places = text.split(token)
    if (found := len(places) - 1) != count:
        raise InputError(f"{where}: the template wrote {found} {kind} placeholders for {count} {kind}s")
    return places


def _filled(places: Sequence[str], tokens: Iterable[str]) -> str:
    return places[0] + "".join(piece for pair in zip(tokens, places[1:], strict=True) for piece in pair)
