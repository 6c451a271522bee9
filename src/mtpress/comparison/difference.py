"""One thing that two checkpoints do not mean alike.

In: two meanings, as mappings from a place to a value. Out: a `Difference` for every place that differs. Leaves out: what a place means.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

EMPTY: tuple[Any, ...] = (None, False, "", [], {}, 0)
Topic = Literal["config", "config-unknown", "processor", "generation", "sampling", "tokenizer", "tokenizer-spelling", "template"]


@dataclass(frozen=True)
class Difference:
    """place: the key as the config spells it, or the file's name and a key; here and there: in words, None for nothing. added: the
    checkpoint has tokens more, and those of the base as the base has them."""

    topic: Topic
    file: str
    place: str
    here: str | None
    there: str | None
    added: bool = False

    def __str__(self) -> str:
        return f"{self.place}: {self.here or 'nothing'}, the source has {self.there or 'nothing'}"


def is_empty(value: Any) -> bool:
    """Whether a key with this value says no more than a missing one: null, false, zero or an empty list."""
    return any(type(value) is type(nothing) and value == nothing for nothing in EMPTY)


def same(here: Any, there: Any) -> bool:
    """Equality of JSON values: 1 and 1.0 are equal, numbers that print alike too; NaN is equal to nothing."""
    if isinstance(here, bool) or isinstance(there, bool):
        return here is there
    if isinstance(here, int | float) and isinstance(there, int | float):
        return bool(abs(here - there) <= 1e-9 * max(abs(here), abs(there)))
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(map(same, here, there))
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(same(here[key], there[key]) for key in here)
    return type(here) is type(there) and bool(here == there)


def differing(
    here: Mapping[str, Any], there: Mapping[str, Any], defaults: Mapping[str, Any], free: Iterable[str]
) -> Iterator[tuple[str, Any, Any]]:
    """(key, value here, value there) of what differs; a missing key has its default, and says the same as an empty value."""
    for key in sorted({*here, *there} - set(free)):
        ours, theirs = here.get(key, defaults.get(key)), there.get(key, defaults.get(key))
        if not same(ours, theirs) and not (is_empty(ours) and is_empty(theirs) and (key not in here or key not in there)):
            yield key, ours, theirs
