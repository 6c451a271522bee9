"""What a repair is: for one rule of `mtpress check`, what is done about its finding, or why nothing can be.

In: a finding and a `Context`: the checkpoint with the changes made so far, and its base where one is given. Out: changes to the
overlay, told as `Fix`, and what stays as it is, told as `Left`. Leaves out: writing (stages/repair.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING

from mtpress.checkpoint.checkpoint import Checkpoint
from mtpress.checkpoint.safetensors import TensorInfo
from mtpress.comparison.relation import Kind
from mtpress.comparison.weights import Comparison, counterparts
from mtpress.quant_config.view import Subject
from mtpress.rules.rule import Finding

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

    NAMES = 0
    CONFIG = 1
    TENSORS = 2
    DECLARATION = 3
    DROPS = 4


@dataclass(frozen=True)
class Context:
    """What a repair may use. may_read: whether weights may be read (a dry run reads none and says what would be done).

    base: None where it is a stranger. measured: what is stored beside the base, where that was compared; base_is: what the user says that
    it is. left_out: safetensors files that are not taken over → why. keep_template: a template that fails stays.
    """

    overlay: "Overlay"
    base: Checkpoint | None
    may_read: bool = True
    measured: Comparison | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    keep_template: bool = False
    base_is: Kind | None = None

    @cached_property
    def theirs(self) -> Mapping[str, TensorInfo]:
        """The base's tensors by their meaning, as counterpart() looks them up; none without a base."""
        return counterparts(self.base) if self.base is not None else {}

    @property
    def comparison(self) -> Comparison | None:
        """What was measured of the tensors that are still as they are stored, by their present names."""
        from mtpress.repairs.measured import remapped

        return remapped(self.measured, self.overlay) if self.measured is not None else None

    @property
    def ancestor(self) -> bool:
        """Whether the base is known to be an ancestor: what it has was not trained with the rest of this checkpoint."""
        relation = self.measured.relation if self.measured is not None else None
        return (self.base_is or (relation.kind if relation is not None else "source")) == "ancestor"

    @property
    def restores(self) -> bool:
        """Whether what merely differs becomes the base's: only where the user says that it is the source."""
        return self.base is not None and self.base_is == "source"

    @property
    def whose(self) -> str:
        """The base, as sentences call it."""
        return "the ancestor" if self.ancestor else "the base"

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


STAYS = "left as it is; `--base-is source`: "
RESTORE = "if it is damaged: run it again with --base-is source; if it was trained so: --base-is ancestor says that it is right"


def told_unless_source(mend: Callable[[Context, Finding], Iterator[Fix | Left]], what: str) -> Mend:
    """A repair that is made only where the user says that the base is the source; else the finding is told."""

    def wrapped(ctx: Context, finding: Finding) -> Iterator[Fix | Left]:
        if ctx.restores:
            yield from mend(ctx, finding)
        else:
            yield Left(f"{what} differs from the base's and is no damage that shows, so it stays as its author left it", RESTORE)

    return wrapped
