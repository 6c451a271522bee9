"""A comparison that was made before anything was mended, as it stands for what the overlay has become.

In: the comparison of what is stored, and an overlay. Out: the same for the tensors that are still as they are stored, by their present
names; two comparisons of different tensors as one. Leaves out: comparing (comparison/weights.py).
"""

from dataclasses import fields
from typing import Any

from mtpress.comparison.weights import Comparison
from mtpress.models.qwen3_5.names import module_of
from mtpress.quant_config.stored import CODES, SCALE_SUFFIXES
from mtpress.repairs.overlay import Overlay


def present_names(overlay: Overlay) -> dict[str, str]:
    """Name that a tensor was measured under → its name now, of those whose bytes stay; and of modules of which every part stays."""
    now = {place.stored: name for name, place in overlay.places.items() if place.stored is not None and place.produce is None}
    tensors, modules = dict[str, str](), dict[str, str | None]()
    for stored, name in overlay.family_names.items():
        here = now.get(stored)
        if here is not None:
            tensors[name] = here
        module, _, suffix = name.rpartition(".")
        if suffix in CODES or suffix in SCALE_SUFFIXES:
            owner = module_of(here) if here is not None else None
            modules[module] = owner if modules.get(module, owner) == owner else None
    return tensors | {module: owner for module, owner in modules.items() if owner is not None and module not in tensors}


def remapped(found: Comparison, overlay: Overlay) -> Comparison:
    """Of what stays, by its present names."""
    now = present_names(overlay)
    made = Comparison(relation=found.relation, differences=found.differences, moved_tokens=found.moved_tokens)
    for item in _measured():
        before = getattr(found, item)
        if isinstance(before, dict):
            setattr(made, item, {now[name]: value for name, value in before.items() if name in now})
        else:
            setattr(made, item, type(before)(now[name] for name in before if name in now))
    return made


def together(one: Comparison, other: Comparison) -> Comparison:
    """Two comparisons of different tensors; files, moved tokens and relation are those of the second."""
    made = Comparison(relation=other.relation, differences=other.differences, moved_tokens=other.moved_tokens)
    for item in _measured():
        before, after = getattr(one, item), getattr(other, item)
        joined: Any = list(dict.fromkeys([*before, *after])) if isinstance(before, list) else before | after
        setattr(made, item, joined)
    return made


def _measured() -> list[str]:
    """The fields that are by tensor or module."""
    return [item.name for item in fields(Comparison) if item.name not in ("relation", "differences", "moved_tokens")]
