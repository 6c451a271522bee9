"""Every rule that `mtpress check` knows, in the order in which findings are shown.

A file here is one topic. A rule is one function over what is known of a checkpoint, with an id, a severity, a meaning
and a remedy; adding one is adding it to the `RULES` of its topic. Ids are part of the command's output: they do not change.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from mtpress.quant_config.view import Subject
from mtpress.rules import against_source as base
from mtpress.rules import (
    config,
    draft_head,
    engine,
    files,
    hashes,
    ignore_lists,
    kv_cache,
    meanings,
    names,
    processors,
    quantization,
    scale_bounds,
    scales,
    template,
    tensors,
    tokenizer,
    values,
    vision,
)
from mtpress.rules.rule import Rule

OPEN_RULES = files.OPEN_RULES
STATIC_RULES = (
    *files.RULES,
    *config.RULES,
    *names.RULES,
    *tensors.RULES,
    *quantization.RULES,
    *ignore_lists.RULES,
    *scales.RULES,
    *kv_cache.RULES,
    *draft_head.RULES,
    *vision.RULES,
    *processors.RULES,
    *tokenizer.RULES,
    *template.RULES,
)
BASE_RULES = (*base.RULES, *meanings.RULES)
BOUND_RULES = scale_bounds.RULES
VALUE_RULES = values.RULES
HASH_RULES = hashes.RULES
ENGINE_RULES = engine.RULES
ALL_RULES = (*OPEN_RULES, *STATIC_RULES, *BASE_RULES, *BOUND_RULES, *VALUE_RULES, *HASH_RULES, *ENGINE_RULES)


def static_rules(subject: Subject) -> tuple[Rule[Subject], ...]:
    """The rules for what needs no weights: all, but of a draft head alone only that it is one."""
    return names.RULES if subject.is_head_alone else STATIC_RULES


def table() -> Iterator[str]:
    """The rule tables of docs/check.md, line by line."""
    sections: dict[str, Iterable[Rule[Any]]] = {
        "Always: headers, small files and float32 scalars": (*OPEN_RULES, *STATIC_RULES),
        "With `--base SRC`: weights, and what stands beside them, against the source": BASE_RULES,
        "With `--base SRC` or `--values`: scales of activations against the weights": BOUND_RULES,
        "With `--values`: the numbers themselves, without a source": VALUE_RULES,
        "With `--hashes`: files against mtpress.json": HASH_RULES,
        "With `--engine`: what vLLM does with it": ENGINE_RULES,
    }
    for title, rules in sections.items():
        yield from (f"### {title}", "", "| id | severity | meaning | remedy |", "|---|---|---|---|")
        yield from (f"| `{rule.id}` | {rule.severity} | {rule.meaning} | {rule.remedy} |" for rule in rules)
        yield ""
