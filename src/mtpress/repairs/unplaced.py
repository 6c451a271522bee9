"""Tensors under names that nobody knows: their author's work, perhaps of a name that is missing.

In: a subject. Out: `unplaced`, the stored tensors of no known place; for each tensor that is missing, the one of them that may be it,
whole, fused, split, turned or packed: of the same layer or part of the model, or of a size that fits. Leaves out: knowing names
(models/qwen3_5/renames.py). What may be the author's is neither dropped nor replaced by a base's.
"""

import math
import re
from collections.abc import Iterable

from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.quant_config.stored import PLAIN_DTYPES, WEIGHT
from mtpress.quant_config.view import Subject
from mtpress.repairs.repair import Left
from mtpress.rules.tensors import unexpected

ITS_NAME = "its right name and layout: rename or split it in the checkpoint, then repair again"
# What training leaves beside the weights, and buffers of other libraries: no engine computes with them.
NO_WEIGHT = re.compile(r"(^|\.)(exp_avg(_sq)?|momentum(_buffer)?|optimizer|grad|num_batches_tracked|position_ids)(\.|$)")


def unplaced(subject: Subject) -> list[str]:
    """Stored tensors that have no place in the model and may be weights."""
    return [name for name in unexpected(subject, all_of_them=True) if name in subject.tensors and not NO_WEIGHT.search(name)]


def absent(subject: Subject) -> list[str]:
    """What the model may have and is not stored under its name: of the body, the draft head and the tower."""
    return [name for name in _shapes(subject) if name not in subject.tensors]


def may_be(subject: Subject, names: Iterable[str]) -> dict[str, str]:
    """Missing name, of those given → the stored tensor of no known place that may be it.

    Where one name of a layer, the head or the tower may be such a tensor, all of them may: parts that are half known are not filled up.
    """
    shapes = _shapes(subject)
    lacking = [name for name in names if name in shapes and name not in subject.tensors and _is_absent(subject, name)]
    strange = [(_part(subject, info.name), info) for info in (*map(subject.tensors.__getitem__, unplaced(subject)), *_misshapen(subject))]
    found, by_part = dict[str, str](), dict[str, str]()
    for name in lacking if strange else ():
        part, shape = _part(subject, name), shapes[name]
        of_it = [i for its, i in strange if (its is not None and its == part) or i.name.startswith((f"{name}.", f"{name}_"))]
        near = [i for its, i in strange if its in (part, None) and (part == "mtp." or _number(i.name) == _number(name))]
        fitting = [info for info in near if _fits(name, info, shape)]
        if fitting or of_it:
            found[name] = min(fitting or of_it, key=lambda i: _distance(name, i, shape)).name
            by_part.setdefault(part or name, found[name])
    return {name: found.get(name, by_part[part]) for name in lacking if (part := _part(subject, name) or name) in by_part}


def told(found: dict[str, str]) -> Left:
    """Why these are not taken from a base."""
    name, other = next(iter(found.items()))
    more = f", and {len(found) - 1} more alike" if len(found) > 1 else ""
    return Left(f"{name} is missing and may be {other}, which mtpress cannot place{more}: nothing is put in its place", ITS_NAME)


def _shapes(subject: Subject) -> dict[str, tuple[int, ...]]:
    """All that the model can hold, of a tower too of which nothing is stored."""
    if not subject.called_for:
        return {}
    shapes = subject.called_for | subject.model.mtp_shapes(subject.config)
    return {**shapes, **(subject.model.vision_shapes(subject.config) if "vision_config" in subject.config else {})}


def _is_absent(subject: Subject, name: str) -> bool:
    """Whether a tensor is stored in no packed form either."""
    module, _, suffix = name.rpartition(".")
    return suffix != WEIGHT or subject.form(module) in ("plain", "none")


def _misshapen(subject: Subject) -> list[TensorInfo]:
    """Plain tensors with more rows than theirs: others may be fused into them."""
    return [info for name, info in subject.tensors.items() if has_more_rows(info, subject.called_for.get(name))]


def has_more_rows(stored: TensorInfo, wanted: tuple[int, ...] | None) -> bool:
    """Whether a tensor in 16 or 32 bits has the columns that it should have, and more rows."""
    if wanted is None or stored.dtype not in PLAIN_DTYPES or len(stored.shape) != len(wanted) or len(wanted) < 2:
        return False
    return stored.shape[1:] == wanted[1:] and stored.shape[0] > wanted[0]


def _part(subject: Subject, name: str) -> str | None:
    """The layer or part of the model that a name stands in; None for one that stands in none."""
    if (layer := subject.model.layer_index(name)) is not None:
        return f"layers.{layer}." if layer < len(subject.model.layer_types(subject.config)) else None
    prefix = subject.prefix or "model.language_model."
    parts = (subject.model.MTP_PREFIX, subject.model.VISION_PREFIX, "lm_head.", f"{prefix}embed_tokens.", f"{prefix}norm.")
    return next((part for part in parts if name.startswith(part)), None)


def _number(name: str) -> str:
    """The first number in a name, its layer or block; none counts that stands last."""
    return next((piece for piece in name.split(".")[:-1] if piece.isdecimal()), "")


def _distance(name: str, stored: TensorInfo, wanted: tuple[int, ...]) -> tuple[bool, bool, int]:
    """By which of several tensors one that is missing is told to be: of its layer, large enough, and not much larger."""
    return _number(stored.name) != _number(name), stored.num_params < math.prod(wanted), stored.num_params


def _fits(name: str, stored: TensorInfo, wanted: tuple[int, ...]) -> bool:
    """Whether a tensor may hold another's numbers by its size: all of them, with others, or a part of the rows. Packed: the same rows."""
    shape = stored.shape
    if name.endswith(".bias") != stored.name.endswith(".bias"):
        return False
    if stored.dtype not in PLAIN_DTYPES:
        return len(wanted) > 1 and wanted[0] in shape
    if math.prod(shape) == math.prod(wanted):
        return True
    return len(shape) == len(wanted) > 1 and shape[1:] == wanted[1:]
