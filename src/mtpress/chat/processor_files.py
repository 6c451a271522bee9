"""Which files hold the settings of picture and video processors, and what of them makes no picture of numbers."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mtpress.json_files import shown

PROCESSOR, IMAGE_PROCESSOR, VIDEO_PROCESSOR = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"


def problems(settings: Mapping[str, Any]) -> Iterator[str]:
    """What of a processor's settings makes no picture of numbers, whatever the model: each in words."""
    for key, lowest in (("image_mean", -math.inf), ("image_std", 0.0), ("rescale_factor", 0.0)):
        said = settings.get(key)
        numbers = said if isinstance(said, list | tuple) else [said]
        if said is not None and not all(lowest < number for number in map(_number, numbers)):
            yield f"{key} is {shown(said)}, must be {'finite' if lowest else 'positive and finite'}"
    for key in ("patch_size", "temporal_patch_size", "merge_size"):
        if (said := settings.get(key)) is not None and not (type(said) is int and said > 0):
            yield f"{key} is {shown(said)}, must be a size"


def _number(value: Any) -> float:
    """NaN, which is larger than nothing, for what is no finite number."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan
