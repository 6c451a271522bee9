"""What a rule is, and what it finds.

In: a subject (quant_config/view.py, or what a comparison or a hash run measured). Out: findings. A rule has one id, one
severity, one meaning and one remedy; its function yields a `Problem` for each thing that is wrong.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar

QUANTIZE_AGAIN = "quantize again: mtpress quantize SRC OUT --recipe NAME"  # the remedy where there is no better
Severity = Literal["error", "warning", "note"]
S = TypeVar("S")


@dataclass(frozen=True)
class Problem:
    """One thing wrong: a sentence, and the names it concerns (tensors, modules, entries or files). remedy, severity: in place of the
    rule's."""

    message: str
    where: tuple[str, ...] = ()
    remedy: str | None = None
    severity: Severity | None = None


@dataclass(frozen=True)
class Finding:
    """A problem under the rule that found it."""

    id: str
    severity: Severity
    message: str
    where: tuple[str, ...]
    remedy: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rule(Generic[S]):
    """error: the engine refuses, or serves something else than was meant. warning: it serves, and should be mended. note: good to know."""

    id: str
    severity: Severity
    meaning: str
    remedy: str
    find: Callable[[S], Iterator[Problem]]


def apply(rules: Iterable[Rule[S]], subject: S) -> Iterator[Finding]:
    """The findings of every rule, in the order of the rules."""
    for rule in rules:
        for problem in rule.find(subject):
            yield Finding(rule.id, problem.severity or rule.severity, problem.message, problem.where, problem.remedy or rule.remedy)
