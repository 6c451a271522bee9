"""Tensors under names that nobody knows, beside others that are missing: the author's own, perhaps, under another name.

In: a subject. Out: for each tensor that is missing, the stored one that may be it: of the same layer, and of a size that can hold it,
renamed, fused with others or turned. Leaves out: knowing names (models/qwen3_5_names.py). What may be the author's is neither dropped nor
replaced by a base's.
"""

import math
import re
from collections.abc import Iterable

from mtpress.repairs.repair import Left
from mtpress.rules.stored import PLAIN_DTYPES
from mtpress.rules.subject import Subject
from mtpress.rules.tensors import tensor_unexpected

ITS_NAME = "its right name: rename it in the checkpoint, or split it, then repair again"


def may_be(subject: Subject, names: Iterable[str]) -> dict[str, str]:
    """Missing name, of those given → the stored tensor of no known place that may be it."""
    unknown = [name for problem in tensor_unexpected(subject) for name in problem.where if name in subject.tensors]
    unknown = [name for name in unknown if subject.tensors[name].dtype in PLAIN_DTYPES]
    shapes = subject.called_for | subject.model.mtp_shapes(subject.config) if unknown else {}
    found = {}
    for name in names:
        shape = shapes.get(name)
        if shape is None or name in subject.tensors or subject.form(name.rpartition(".")[0]) not in ("plain", "none"):
            continue
        fitting = (u for u in unknown if _layer(u) == _layer(name) and _can_hold(subject.tensors[u].shape, shape))
        if (other := next(fitting, None)) is not None:
            found[name] = other
    return found


def told(found: dict[str, str]) -> Left:
    """Why these are not taken from a base."""
    name, other = next(iter(found.items()))
    more = f", and {len(found) - 1} more alike" if len(found) > 1 else ""
    return Left(f"{name} is missing and may be {other}, a name that mtpress does not know{more}: nothing is put in its place", ITS_NAME)


def _layer(name: str) -> tuple[str, ...]:
    """The numbers in a name: its layer, block and the like."""
    return tuple(re.findall(r"(?<=\.)\d+(?=\.)", f".{name}."))


def _can_hold(stored: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """The same numbers in some order, or the same columns and more rows."""
    if math.prod(stored) == math.prod(wanted):
        return True
    return len(stored) == len(wanted) > 1 and stored[1:] == wanted[1:] and stored[0] > wanted[0]
