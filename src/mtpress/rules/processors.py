"""Rules on the settings of the picture and video processors that need no source."""

from collections.abc import Iterator

from mtpress.comparison.processors import unsound
from mtpress.quant_config.view import Subject
from mtpress.rules.rule import Problem, Rule


def processor_unsound(subject: Subject) -> Iterator[Problem]:
    for file, problem in dict.fromkeys(unsound(subject.json)) if subject.is_vl else ():
        yield Problem(f"{file}: {problem}", (file,))


RULES = (
    Rule(
        "processor-unsound",
        "error",
        "A setting of the picture or video processor gives no numbers, as a division by an image_std of 0: every picture is NaN to the "
        "model, and nothing is wrong with its weights.",
        "copy the file from the source: mtpress repair CKPT OUT --base SRC",
        processor_unsound,
    ),
)
