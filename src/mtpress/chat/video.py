"""Videos → frames at their times → pixels, as transformers' Qwen3VL video processor makes them, without torchvision.

In: an animated GIF, WEBP or PNG (Pillow), a list of pictures, or a film where a decoder is installed, and the settings of a
checkpoint's video_preprocessor_config.json. Out: `Video`: the chosen frames and when they are seen; and patches with their grid.
Leaves out: the words around them (chat/encoder.py), the vision tower (models/). Which frames are taken and how large they become is
decided by transformers' own functions; resizing by torch's kernel for bytes, which torchvision calls too.

Videos come from strangers: frames are counted and measured before they are decoded.
"""

import base64
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch.nn.functional import interpolate
from transformers import video_utils

from mtpress.alarm import TimeUp, alarm
from mtpress.chat.picture_limits import limits
from mtpress.chat.template import reason
from mtpress.errors import InputError

MAX_VIDEO_FRAMES = 100_000  # before some are chosen
MAX_VIDEO_PIXELS = 200_000_000  # of the chosen frames together: 600 MB as bytes
MAX_ANIMATION_PIXELS = 4_000_000_000  # of all frames: each is drawn over the one before, so all are decoded; half a minute
MAX_COUNT_SECONDS = 20.0  # a GIF says nowhere how many frames it has
ANIMATION_FORMATS = ("GIF", "WEBP", "PNG")
FRAME_SECONDS = 0.1  # of a frame that names no time, as browsers show it
DECODERS = (("torchcodec", "torchcodec"), ("pyav", "av"), ("opencv", "cv2"))  # transformers' name, the package's


@dataclass
class Video:
    """frames: uint8 [T, 3, H, W], RGB. seconds: when each is seen."""

    frames: torch.Tensor
    seconds: list[float]


def open_video(source: Any, processor: Any, where: str, fps: Any = None) -> Video:
    """The frames of a video part that the processor would take; InputError names `where` it was asked for.

    source: a path, a data URI, {"url": …}, or a list of pictures, all of which are taken. fps: how many of a list's pictures, or of an
    animation's frames, are one second; without it the processor's own rate, or the times that the animation says.
    """
    if isinstance(source, Mapping):
        source = source.get("url")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000):
        raise InputError(f"{where}: fps of a video must be a number over 0 and up to 1000, is {str(fps)[:40]!r}")
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _from_pictures(source, where, float(fps or processor.fps))
    if not isinstance(source, str):
        raise InputError(f"{where}: a video must be a path, a data URI or a list of images, got {type(source).__name__}")
    shown = f"{where}: video {source[:80]!r}"
    if source.startswith(("http://", "https://")):
        raise InputError(f"{shown} is a web address; download the video and name its path")
    try:
        data, film = _stored(source)
        video = _decode_film(data, processor) if film else _animation(data, processor, fps)
    except InputError as error:
        raise InputError(f"{shown} {error}") from None
    except TimeUp:
        raise InputError(f"{shown} has more frames than can be counted in {MAX_COUNT_SECONDS:.0f} s; make it shorter") from None
    except Exception as error:  # decoders of damaged videos raise errors of every kind
        raise InputError(f"{shown} does not open ({reason(error)[:120]})") from None
    return video


def _stored(source: str) -> tuple[Any, bool]:
    """(bytes or a path, whether Pillow does not know it for an animation)."""
    if source.startswith("data:"):
        data: Any = io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
        kind = source[5:].partition(";")[0]
        if kind.startswith("video/"):
            raise InputError("is a film in a data URI; save it and name its path")
        return data, False
    path = Path(source.removeprefix("file://"))
    if not path.is_file():
        raise InputError("is not a file")
    return path, path.suffix.lower() not in (".gif", ".webp", ".png", ".apng")


def _from_pictures(sources: Sequence[Any], where: str, fps: float) -> Video:
    from mtpress.chat.images import open_image

    if len(sources) < 2:
        raise InputError(f"{where}: a video of {len(sources)} frames; it needs two or more, a single picture is an image")
    if len(sources) > MAX_VIDEO_FRAMES:
        raise InputError(f"{where}: a video of {len(sources):,} frames, over {MAX_VIDEO_FRAMES:,}")
    frames: list[torch.Tensor] = []
    for number, source in enumerate(sources, 1):
        picture = open_image(source, f"{where}: frame {number}")
        _refuse_large(where, len(sources), picture.width, picture.height)
        frames.append(_as_tensor(picture))
        if frames[-1].shape != frames[0].shape:
            first = frames[0].shape
            raise InputError(
                f"{where}: frame {number} is {picture.width}×{picture.height}, frame 1 is {first[2]}×{first[1]}; make them equal"
            )
    return Video(torch.stack(frames), [number / fps for number in range(len(frames))])


def _animation(data: Any, processor: Any, fps: float | None) -> Video:
    """The chosen frames of an animated picture, one after another, for each is drawn over the one before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        with Image.open(data, formats=ANIMATION_FORMATS) as image:
            with alarm(MAX_COUNT_SECONDS):
                count = getattr(image, "n_frames", 1)
            if count < 2:
                raise InputError("has a single frame; a picture is an image, not a video")
            if count > MAX_VIDEO_FRAMES:
                raise InputError(f"has {count:,} frames, over {MAX_VIDEO_FRAMES:,}")
            if (pixels := count * image.width * image.height) > MAX_ANIMATION_PIXELS:
                raise InputError(
                    f"has {pixels:,} pixels in its {count:,} frames, over {MAX_ANIMATION_PIXELS:,}; make it smaller or shorter"
                )
            size = image.size
            rate = fps or count / sum(_frame_seconds(frame) for frame in _frames(image, size))
            metadata = video_utils.VideoMetadata(total_num_frames=count, fps=rate, width=image.width, height=image.height)
            indices = _choose(processor, metadata)
            wanted, frames = set(indices), {}
            for number, frame in enumerate(_frames(image, size)):
                if number in wanted:
                    frames[number] = _as_tensor(frame.convert("RGB"))
            return Video(torch.stack([frames[i] for i in indices]), [i / rate for i in indices])


def _frames(image: Image.Image, size: tuple[int, int]) -> Iterator[Image.Image]:
    """One after another. A GIF's canvas grows with a frame beyond it, and what it then costs nobody has counted."""
    for frame in ImageSequence.Iterator(image):
        if frame.size != size:
            raise InputError(f"has a frame of {frame.width}×{frame.height} on a canvas of {size[0]}×{size[1]}")
        yield frame


def _frame_seconds(frame: Image.Image) -> float:
    frame.load()  # WEBP says the time of a frame only then
    return float(frame.info.get("duration") or 0) / 1000 or FRAME_SECONDS


def _decode_film(path: Path, processor: Any) -> Video:
    import importlib.util

    decoder = next((name for name, package in DECODERS if importlib.util.find_spec(package) is not None), None)
    if decoder is None:
        raise InputError("needs a decoder: pip install av; or name its frames: a list of image files, or an animated GIF, WEBP or PNG")

    def choose(metadata: Any, **_: Any) -> np.ndarray:
        if not metadata.total_num_frames or not metadata.fps:
            raise ValueError("it does not say how many frames it has, or how fast they follow")
        return np.array(_choose(processor, metadata))

    frames, metadata = video_utils.load_video(str(path), backend=decoder, sample_indices_fn=choose)
    frames = torch.as_tensor(np.ascontiguousarray(frames))
    if frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2)
    return Video(frames.contiguous(), [int(i) / float(metadata.fps) for i in metadata.frames_indices])


def _choose(processor: Any, metadata: Any) -> list[int]:
    """Which frames the processor takes: transformers' own rule."""
    indices = [int(i) for i in processor.sample_frames(metadata)]
    _refuse_large("", len(indices), metadata.width or 1, metadata.height or 1)
    return indices


def _refuse_large(where: str, count: int, width: int, height: int) -> None:
    if count * width * height > MAX_VIDEO_PIXELS:
        what = f"is {count:,} frames of {width}×{height} pixels, over {MAX_VIDEO_PIXELS:,} together; make it smaller or shorter"
        raise InputError(f"{where}: a video {what}" if where else what)


def _as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def patches(frames: torch.Tensor, processor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(float32 [t·h·w, 3·2·patch·patch], int64 [1, 3] grid t, h, w) of frames uint8 [T, 3, H, W].

    Source: transformers 5.19, models/qwen3_vl/video_processing_qwen3_vl.py.
    """
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    depth, patch, merge = processor.temporal_patch_size, processor.patch_size, processor.merge_size
    count, factor, (least, most) = len(frames), patch * merge, limits(processor)
    if getattr(processor, "cap_pixels_per_frame", None):
        most = count * max(min(processor.max_video_tokens * factor**2, most // count), int(least * 1.05))
    sides = {"height": frames.shape[2], "width": frames.shape[3]}
    height, width = smart_resize(num_frames=count, **sides, temporal_factor=depth, factor=factor, min_pixels=least, max_pixels=most)
    if count * height * width > MAX_VIDEO_PIXELS:
        raise ValueError(f"it becomes {count:,} frames of {width}×{height} pixels, over {MAX_VIDEO_PIXELS:,} together")
    if (height, width) != frames.shape[2:]:
        frames = interpolate(frames, size=(height, width), mode="bicubic", antialias=True)
    mean, deviation = (torch.tensor(of) * (1.0 / processor.rescale_factor) for of in (processor.image_mean, processor.image_std))
    pixels = frames.float().sub_(mean.view(-1, 1, 1)).div_(deviation.view(-1, 1, 1))
    pixels = torch.cat([pixels, pixels[-1:].expand(-count % depth, -1, -1, -1)])
    grid = (len(pixels) // depth, height // patch, width // patch)
    cut = pixels.view(grid[0], depth, 3, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch)
    return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1), torch.tensor([grid])


def placeholders(seconds: Iterable[float], grid: torch.Tensor, processor: Any) -> str:
    """What the template's one placeholder becomes: for each patch of time when it is seen, and as many tokens as it has merged patches.

    Source: transformers 5.19, models/qwen3_vl/processing_qwen3_vl.py, replace_video_token.
    """
    depth = processor.temporal_patch_size
    times = list(seconds)
    times += times[-1:] * (-len(times) % depth)
    _, height, width = grid[0].tolist()
    pads = "<|video_pad|>" * (height * width // processor.merge_size**2)
    middles = ((times[i] + times[i + depth - 1]) / 2 for i in range(0, len(times), depth))
    return "".join(f"<{middle:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for middle in middles)
