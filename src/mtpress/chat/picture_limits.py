"""What pictures of strangers may cost: pixels of one row, stored and as a processor resizes them, and what a processor may ask for.

In: sources of pictures, a processor. Out: pictures, or an InputError before the memory is taken. Leaves out: opening one
(chat/encoder.py), and the frames of videos (chat/video.py).
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from mtpress.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

MAX_ROW_PIXELS = 200_000_000  # of all pictures of a row as they are stored: 600 MB
MAX_RESIZED_PIXELS = 100_000_000  # of all pictures of a row as the tower sees them: 2.4 GB, and 100,000 tokens
MAX_PROCESSOR_PIXELS = 200_000_000  # Qwen's: 16,777,216 of a picture, 25,165,824 of a video
MAX_PATCH = 64  # patch_size and the like; Qwen's are 16 and 2


def opened(sources: Sequence[Any], where: str, open_one: Callable[[Any, str], "Image.Image"]) -> list["Image.Image"]:
    """The pictures of a row in order; one that stands there several times is decoded once. InputError for more than MAX_ROW_PIXELS."""
    known: dict[Hashable, Image.Image] = {}
    found: list[Image.Image] = []
    pixels = 0
    for source in sources:
        key = source if isinstance(source, str | bytes) else id(source)
        if key not in known:
            known[key] = open_one(source, where)
            pixels += known[key].width * known[key].height
            if pixels > MAX_ROW_PIXELS:
                raise InputError(f"{where}: its pictures have over {MAX_ROW_PIXELS:,} pixels together; make them smaller, or fewer")
        found.append(known[key])
    return found


def refuse_resized(images: Sequence["Image.Image"], processor: Any, where: str) -> None:
    """InputError where the processor would make more than MAX_RESIZED_PIXELS of a row."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    least, most = limits(processor)
    factor = processor.patch_size * processor.merge_size
    pixels = 0
    for image in images:
        try:
            height, width = smart_resize(image.height, image.width, factor=factor, min_pixels=least, max_pixels=most)
        except ValueError:  # odd sides, which the processor refuses with its own words
            continue
        pixels += height * width
    if pixels > MAX_RESIZED_PIXELS:
        raise InputError(f"{where}: its pictures become over {MAX_RESIZED_PIXELS:,} pixels together; make them smaller, or fewer")


def limits(processor: Any) -> tuple[int, int]:
    """(fewest, most) pixels of a picture or video, by the processor's `size`."""
    return int(processor.size["shortest_edge"]), int(processor.size["longest_edge"])


def refuse_processor(processor: Any, file: str) -> None:
    """InputError for a processor whose sizes no tower has."""
    try:
        least, most = limits(processor)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise InputError(f"{file}: size must hold shortest_edge and longest_edge; copy it from the base") from None
    if not 0 < least <= most <= MAX_PROCESSOR_PIXELS:
        raise InputError(
            f"{file}: size asks for {least:,} to {most:,} pixels; 1 to {MAX_PROCESSOR_PIXELS:,} is what is taken, copy it from the base"
        )
