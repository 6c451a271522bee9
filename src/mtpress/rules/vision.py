"""Rules on the vision tower: it is whole, or it is gone and config.json says so."""

from collections.abc import Iterator

from mtpress.chat.processor_files import IMAGE_PROCESSOR, PROCESSOR, VIDEO_PROCESSOR
from mtpress.models.qwen3_5.engine import TEXT_ARCHITECTURE
from mtpress.quant_config.view import CONFIG, TEXT_ONLY_FLAG, Subject, stripped
from mtpress.rules.rule import Problem, Rule
from mtpress.terminal import count


def vision_stripped(subject: Subject) -> Iterator[Problem]:
    if stripped(subject):
        yield Problem("the vision tower was stripped")


def vision_missing(subject: Subject) -> Iterator[Problem]:
    if subject.is_vl and not subject.stored_vision and not stripped(subject):
        yield Problem(f"no {subject.model.VISION_PREFIX}* tensor is there, config.json promises a tower", (CONFIG,))


def vision_called_stripped(subject: Subject) -> Iterator[Problem]:
    if subject.stored_vision and subject.config.get("language_model_only") is True:
        yield Problem(
            f"config.json says language_model_only, {count(len(subject.stored_vision), 'tensor')} of the tower are stored", (CONFIG,)
        )


def vision_in_text_model(subject: Subject) -> Iterator[Problem]:
    if subject.stored_vision and not subject.is_vl:
        why = f"{TEXT_ARCHITECTURE} has no tower" if subject.architecture == TEXT_ARCHITECTURE else "config.json has no vision_config"
        yield Problem(f"{count(len(subject.stored_vision), 'tensor')} of a vision tower, but {why}", subject.stored_vision)


def processor_missing(subject: Subject) -> Iterator[Problem]:
    if not subject.stored_vision or not subject.is_vl:
        return
    whole = subject.json(PROCESSOR) or {}
    needed = {IMAGE_PROCESSOR: "image_processor", VIDEO_PROCESSOR: "video_processor"}
    missing = tuple(name for name, key in needed.items() if not subject.has(name) and key not in whole)
    if missing:
        yield Problem(f"no {' and no '.join(missing)}", missing)


RULES = (
    Rule(
        "vision-stripped",
        "note",
        "The vision tower was taken out and config.json says so (language_model_only). vLLM reads no such key: without the flag it builds "
        "the tower and serves it with random weights.",
        f"serve with {TEXT_ONLY_FLAG}; mtpress serve does",
        vision_stripped,
    ),
    Rule(
        "vision-missing",
        "error",
        "The architecture has a vision tower, none is stored, and config.json does not say that it was taken out: pictures are read with "
        "random weights.",
        f'restore it: mtpress repair CKPT OUT --base SRC; or set "language_model_only": true and serve with {TEXT_ONLY_FLAG}',
        vision_missing,
    ),
    Rule(
        "vision-called-stripped",
        "warning",
        "config.json says language_model_only although the tower is there.",
        'set "language_model_only": false in config.json: mtpress repair CKPT OUT',
        vision_called_stripped,
    ),
    Rule(
        "vision-in-text-model",
        "error",
        "Vision tensors in a checkpoint that is built without a tower: vLLM stops with a ValueError.",
        "restore config.json: mtpress repair CKPT OUT --base SRC; or take them out, where the model is meant to be without them",
        vision_in_text_model,
    ),
    Rule(
        "processor-missing",
        "error",
        "The vision tower is there, the files that say how pictures and videos are cut into patches are not: the engine does not start.",
        "copy them from the source: mtpress repair CKPT OUT --base SRC",
        processor_missing,
    ),
)
