"""A comparison that was made before anything was mended, as it stands for what the overlay has become.

In: the comparison of what is stored, and an overlay. Out: the same for the tensors that are still as they are stored, by their present
names; two comparisons of different tensors as one. Leaves out: comparing (comparison.py).
"""

from dataclasses import fields
from typing import Any

from mtpress.comparison import Comparison
from mtpress.models.qwen3_5 import module_of
from mtpress.repairs.overlay import Overlay
from mtpress.rules.stored import CODES, SCALE_SUFFIXES


def present_names(overlay: Overlay) -> dict[str, str]:
    """Name that a tensor is stored under → its name now, of those whose bytes stay; and the same of modules of which every part stays."""
    tensors = {place.stored: name for name, place in overlay.places.items() if place.stored is not None and place.produce is None}
    modules: dict[str, str | None] = {}
    for name in overlay.stored.tensors:
        module, _, suffix = name.rpartition(".")
        if suffix in CODES or suffix in SCALE_SUFFIXES:
            now = tensors.get(name)
            here = module_of(now) if now is not None else None
            modules[module] = here if modules.get(module, here) == here else None
    return tensors | {module: now for module, now in modules.items() if now is not None and module not in tensors}


def remapped(found: Comparison, overlay: Overlay) -> Comparison:
    """Of what stays, by its present names."""
    now = present_names(overlay)
    made = Comparison(relation=found.relation, differences=found.differences)
    for item in _measured():
        before = getattr(found, item)
        if isinstance(before, dict):
            setattr(made, item, {now[name]: value for name, value in before.items() if name in now})
        else:
            setattr(made, item, type(before)(now[name] for name in before if name in now))
    return made


def together(one: Comparison, other: Comparison) -> Comparison:
    """Two comparisons of different tensors; files and relation are those of the second."""
    made = Comparison(relation=other.relation, differences=other.differences)
    for item in _measured():
        before, after = getattr(one, item), getattr(other, item)
        joined: Any = list(dict.fromkeys([*before, *after])) if isinstance(before, list) else before | after
        setattr(made, item, joined)
    return made


def _measured() -> list[str]:
    """The fields that are by tensor or module."""
    return [item.name for item in fields(Comparison) if item.name not in ("relation", "differences")]
