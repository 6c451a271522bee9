"""Pictures of a conversation: which files are opened, how large they may be."""

import base64
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mtpress.chat.template import reason
from mtpress.errors import InputError

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow would hand others to programs of the system
MAX_PICTURE_PIXELS = 50_000_000


def open_image(source: Any, where: str) -> Image.Image:
    """The RGB image of a path, data URI or PIL image; InputError names `where` it was asked for."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Mapping):  # data sets hold a file's bytes, messages its address
        source = source.get("bytes") or source.get("url") or source.get("path")
    if not isinstance(source, str | bytes):
        raise InputError(f"{where}: an image must be a path, a data URI or {{'url': ...}}, got {type(source).__name__}")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise InputError(f"{where}: {source[:80]} is a web address; download the image and name its path")
    try:
        if isinstance(source, bytes):
            data: Any = io.BytesIO(source)
        elif source.startswith("data:"):
            data = io.BytesIO(base64.b64decode(source.partition(",")[2], validate=True))
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
        shown = f"of {len(source)} bytes" if isinstance(source, bytes) else repr(source[:80])
        raise InputError(f"{where}: image {shown} does not open ({reason(error)[:120]})") from None
