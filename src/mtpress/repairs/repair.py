"""What a repair is: for one rule of `mtpress check`, what is done about its finding, or why nothing can be.

In: a finding and a `Context`: the checkpoint with the changes made so far, and its base where one is given. Out: changes to the
overlay, told as `Fix`, and what stays as it is, told as `Left`. Leaves out: writing (stages/repair.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from mtpress.checkpoint import Checkpoint
from mtpress.comparison import Comparison
from mtpress.rules.rule import Finding
from mtpress.rules.subject import Subject

if TYPE_CHECKING:
    from mtpress.repairs.overlay import Overlay


@dataclass(frozen=True)
class Fix:
    """What was done, in words that stand for themselves."""

    how: str


@dataclass(frozen=True)
class Left:
    """Why a finding, or a part of it, is left, and what it would take."""

    why: str
    takes: str


class Turn(IntEnum):
    """When a repair has its turn: what later ones go by comes first, and what throws away comes last."""

    CONFIG = 0
    TENSORS = 1
    DECLARATION = 2
    DROPS = 3


@dataclass(frozen=True)
class Context:
    """What a repair may use. may_read: whether weights may be read (a dry run reads none and says what would be done).

    comparison: with the base, where one was made. left_out: safetensors files that are not taken over → why. keep_template: a template
    that fails stays.
    """

    overlay: "Overlay"
    base: Checkpoint | None
    may_read: bool = True
    comparison: Comparison | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    keep_template: bool = False

    @property
    def subject(self) -> Subject:
        """The checkpoint as it stands with all changes so far."""
        return self.overlay.subject


Mend = Callable[[Context, Finding], Iterator[Fix | Left]]


@dataclass(frozen=True)
class Repair:
    """The repair of one rule. summary: for the documentation; mend: None where there is none, and `summary` says why."""

    rule_id: str
    summary: str
    mend: Mend | None = None
    turn: Turn = Turn.TENSORS


OTHER_BASE = "name the checkpoint that this one was made from as --base"


def needs_base(what: str) -> Left:
    """What can only come from the BF16 source, when none is given."""
    return Left(f"{what} can only come from the source", "run it again with --base SRC")
