"""Everything beside the weights of a checkpoint against its source's.

In: the subject of the checkpoint and its open source. Out: the list of `Difference`s. Leaves out: judging (rules/meanings.py).
"""

from collections.abc import Iterator
from typing import Any

from mtpress.chat.template import template
from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.record import RECORD_NAME
from mtpress.comparison import config, generation, processors, tokenizer
from mtpress.comparison.difference import Difference
from mtpress.quant_config.tokenizer_files import END, GENERATION, TEXT_END, templates, token_ids
from mtpress.quant_config.view import Subject


def differences(subject: Subject, base: Checkpoint) -> list[Difference]:
    """In the order of config, processors, tokenizer, generation, template."""
    source = Subject(base)
    here, there = (subject.model.untied_config(one.config, one.tensors) for one in (subject, source))
    found = list(config.differences(here, there))
    if subject.is_vl:
        found += processors.differences(subject.json, source.json)
    found += tokenizer.differences(subject.json, subject.text, source.json, source.text)
    marks = {number for token, number in token_ids(source).items() if token in (END, TEXT_END)}
    found += generation.differences(subject.json(GENERATION), source.json(GENERATION), _chosen(subject), marks)
    return [*found, *_template(subject, source)]


def _chosen(subject: Subject) -> dict[str, Any]:
    """The sampling that the recipe set, by mtpress.json."""
    recipe = (subject.json(RECORD_NAME) or {}).get("recipe")
    chosen = recipe.get("generation_config") if isinstance(recipe, dict) else None
    return chosen if isinstance(chosen, dict) else {}


def _template(subject: Subject, source: Subject) -> Iterator[Difference]:
    ours, theirs = (next(iter(templates(one).items()), None) for one in (subject, source))
    if ours is None or ours[1] is None:
        return
    if ours[1].strip() not in {text.strip() for text in (template(), theirs[1] if theirs is not None else None) if text is not None}:
        yield Difference("template", ours[0], ours[0], f"{len(ours[1])} characters", f"{len(theirs[1] or '')}" if theirs else None)
