"""How pictures and videos become patches, by whichever files say it.

In: the processor files of a checkpoint and of its source. Out: a `Difference` for every setting that is not the source's. Leaves out:
missing files (rules/vision.py).

transformers 5 reads processor_config.json first where it holds image_processor and video_processor, older versions read
preprocessor_config.json and video_preprocessor_config.json: each file that is there must mean what the source means.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mtpress.chat.processor_files import IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR, problems
from mtpress.comparison.difference import Difference, differing
from mtpress.json_files import shown

# transformers 5.19: models/qwen2_vl/image_processing_qwen2_vl.py and models/qwen3_vl/video_processing_qwen3_vl.py.
SHARED = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
IMAGE_DEFAULTS = SHARED | {
    "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "shortest_edge": 3136, "longest_edge": 1003520,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
VIDEO_DEFAULTS = SHARED | {
    "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "shortest_edge": 131072, "longest_edge": 786432,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "min_frames": 4, "max_frames": 768, "do_sample_frames": True, "fps": 2,
    "max_video_tokens": 768,
}  # fmt: skip
FREE = {
    "processor_class", "feature_extractor_type", "device", "return_tensors", "data_format", "input_data_format", "disable_grouping",
    "return_metadata", "video_metadata", "default_to_square", "size", "min_pixels", "max_pixels", "_processor_class",
}  # fmt: skip
IMAGE, VIDEO = "image_processor", "video_processor"
KINDS = {IMAGE: (IMAGE_PROCESSOR, IMAGE_DEFAULTS), VIDEO: (VIDEO_PROCESSOR, VIDEO_DEFAULTS)}
Read = Callable[[str], Mapping[str, Any] | None]


def _means(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under one spelling: the size as two counts of pixels, the class without the suffix of its speed."""
    found = {key: value for key, value in content.items() if key not in FREE}
    size = content.get("size")
    if isinstance(size, Mapping):
        found |= {key: value for key, value in size.items() if value is not None}
    elif size is not None:
        found["size"] = size
    for key, name in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if content.get(key) is not None:
            found[name] = content[key]
    for key in ("image_processor_type", "video_processor_type"):
        if isinstance(said := found.pop(key, None), str):
            found["class"] = said.removesuffix("Fast")
    return found


def _said(read: Read, kind: str) -> dict[str, dict[str, Any]]:
    """File → the settings of one processor, of every file that has them, the one that counts first."""
    file, _ = KINDS[kind]
    found = {}
    if isinstance(inner := (read(PROCESSOR) or {}).get(kind), Mapping):
        found[PROCESSOR] = _means(inner)
    if (content := read(file)) is not None:
        found[file] = _means(content)
    if not found and kind == VIDEO and (content := read(IMAGE_PROCESSOR)) is not None:
        found[IMAGE_PROCESSOR] = {key: value for key, value in _means(content).items() if key != "class"}
    return found


def unsound(read: Read) -> Iterator[tuple[str, str]]:
    """(file, what is wrong in it) of the processors of a checkpoint."""
    for kind in KINDS:
        for file, settings in _said(read, kind).items():
            for problem in problems(settings):
                yield file, problem


def differences(read: Read, base: Read) -> Iterator[Difference]:
    """read, base: the content of a JSON file by its name, None where there is none."""
    for kind, (_, defaults) in KINDS.items():
        theirs = next(iter(_said(base, kind).values()), None)
        for file, ours in _said(read, kind).items():
            for key, here, there in differing(ours, theirs, defaults, ()) if theirs is not None else ():
                if key == "class" and (here is None or there is None):
                    continue
                place = f"{file}: {f'{kind}.' if file == PROCESSOR else ''}{key}"
                yield Difference(
                    "processor", file, place, None if here is None else shown(here), None if there is None else shown(there)
                )  # fmt: skip
