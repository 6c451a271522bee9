"""What a base is to a checkpoint: its source, its ancestor, or a stranger.

In: how near each stored tensor is to the base's of the same name (`Closeness`, measured by comparison/weights.py). Out: a `Relation`.
Leaves out: measuring, and what follows from it: rules/against_source.py judges by it, repairs/ take by it.

    source     what was kept is the base's bit for bit, and what was quantized is within the rounding of its format
    ancestor   the shapes are the base's, and matrices that were kept are near the base's and unequal: trained on, ablated, merged
    stranger   the shapes are others, or most matrices have nothing of the base's

What decides are the matrices that are stored in 16 or 32 bits, those of the body before all others. Damage is no training: a matrix that
holds NaN, is a multiple of the base's, has nothing of it, or differs in a few rows only, says nothing of where the rest comes from. Nor
do vectors: tools round norms. Nor does the draft head, which has a training of its own. Where every matrix is quantized, the quantized ones
decide.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mtpress.errors import InputError

Kind = Literal["source", "ancestor", "stranger"]
KINDS: tuple[Kind, ...] = get_args(Kind)
State = Literal["equal", "rounded", "changed", "rescaled", "altered", "unrelated", "damaged"]
LEAST_COSINE = (
    0.5  # of matrices that have something in common: training moves a matrix by a few percent, two of one shape have 0 ± 1/√params
)
ONE_FACTOR = 0.02  # a matrix that is the base's times one number is as near to that as its dtype rounds
SAME_SIZE = 0.2  # and the number differs from 1 by more than this
FEW_ROWS = 0.5  # training touches every row of a matrix, but for the rows of tokens that it does not see
BODY = ("embeddings", "gdn", "attention", "mlp", "lm_head")
BY_TOKEN = ("embeddings", "lm_head")


@dataclass(frozen=True)
class Closeness:
    """A stored tensor ŵ beside the base's w of its name.

    part: the component; matrix: of two dimensions or more; quantized: not in 16 or 32 bits; norm: ‖w‖; own_norm: ‖ŵ‖; dot: w·ŵ;
    distance: ‖w − ŵ‖; limit: how far rounding to the format brings it, in ‖w‖; rows, rows_changed, rows_zeroed: of all, that differ, and
    that are zero where the base's are not;
    not_finite: numbers, or scales, that are NaN or infinite; the sums are over the others.
    """

    part: str
    matrix: bool
    quantized: bool
    norm: float = 0.0
    own_norm: float = 0.0
    dot: float = 0.0
    distance: float = 0.0
    limit: float = 0.0
    rows: int = 0
    rows_changed: int = 0
    rows_zeroed: int = 0
    not_finite: int = 0
    equal: bool = False

    @property
    def error(self) -> float:
        """‖w − ŵ‖ / ‖w‖."""
        if self.norm == 0.0:
            return 0.0 if self.distance == 0.0 else float("inf")
        return self.distance / self.norm

    @property
    def cosine(self) -> float:
        return self.dot / (self.norm * self.own_norm) if self.norm and self.own_norm else 0.0

    @property
    def factor(self) -> float:
        """The f for which f · w is nearest to ŵ."""
        return self.dot / self.norm**2 if self.norm else 0.0

    @property
    def off_by_a_factor(self) -> bool:
        """Whether it is the base's times one number, within the rounding of its format: nothing that is trained is."""
        rest = max(self.own_norm**2 - self.factor * self.dot, 0.0) ** 0.5  # ‖ŵ − f · w‖
        return self.factor > 0 and abs(self.factor - 1) > SAME_SIZE and rest <= max(self.limit, ONE_FACTOR) * self.factor * self.norm

    @property
    def state(self) -> State:
        if self.equal:
            return "equal"
        if self.not_finite:
            return "damaged"
        if self.error <= self.limit:
            return "rounded"
        if self.off_by_a_factor:
            return "rescaled"
        if self.cosine < LEAST_COSINE:
            return "unrelated"
        few = 1 if self.part in BY_TOKEN else FEW_ROWS * self.rows
        return "altered" if self.rows_changed <= few and not self.quantized and self.matrix else "changed"


@dataclass(frozen=True)
class Relation:
    """kind, and the evidence in words. given: the user said so, whatever the weights say. found: what they say."""

    kind: Kind
    why: str
    given: bool = False
    found: Kind | None = None

    @property
    def line(self) -> str:
        """One sentence for the terminal."""
        said = " (as --base-is says)" if self.given else ""
        names = {"source": "the base is the source", "ancestor": "the base is an ancestor", "stranger": "the base is of another model"}
        return f"{names[self.kind]}{said}: {self.why}"

    def as_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "given": self.given, "found": self.found, "why": self.why}


def relation_of(closeness: Iterable[Closeness], num_without: int, num_grown: int = 0, given: Kind | None = None) -> Relation:
    """num_without: tensors of the checkpoint that the base has not in that shape; num_grown: of those, that only have more rows."""
    found, why = _found(list(closeness), num_without - num_grown, num_grown)
    return Relation(given or found, why, given is not None, found)


def _found(closeness: list[Closeness], num_without: int, num_grown: int) -> tuple[Kind, str]:
    states = [one.state for one in closeness]
    if num_without > len(closeness):
        return "stranger", f"{num_without} of {num_without + len(closeness)} tensors have no counterpart of equal shape"
    whole = [one for one in closeness if one.matrix and one.state != "damaged"]
    kept = [one for one in whole if not one.quantized]
    body = [one for one in kept if one.part in BODY]
    judged = body or [one for one in whole if one.part in BODY] or whole or closeness
    unrelated = sum(one.state == "unrelated" for one in judged)
    if not closeness or 2 * unrelated > len(judged):
        return "stranger", f"{unrelated} of {len(judged)} matrices have nothing of the base's" if closeness else "they share no tensor"
    # Of quantized matrices alone: damage to codes or scales is nowhere all over the model, and training is.
    changed = [one for one in kept if one.state == "changed" and one.part != "mtp"]
    if not body:
        changed = [one for one in judged if one.state == "changed"] if 2 * sum(s == "changed" for s in states) > len(judged) else []
    equal = _counted(states)
    if changed:
        furthest = max(one.error for one in changed)
        return "ancestor", f"{equal}; {_matrices(len(changed))} near the base's and unequal (‖w − ŵ‖/‖w‖ up to {furthest:.2g})"
    if num_grown:
        return "ancestor", f"{equal}; {num_grown} tensors have other rows than the base's vocabulary"
    return "source", equal


def _matrices(number: int) -> str:
    return f"{number} matrix" if number == 1 else f"{number} matrices"


def _counted(states: list[State]) -> str:
    """ "100 of 104 tensors are the base's bit for bit, 2 within the rounding of their format, 1 NaN or infinite, 1 otherwise different"."""
    parts = [f"{states.count('equal')} of {len(states)} tensors are the base's bit for bit"]
    rounded, damaged = states.count("rounded"), states.count("damaged")
    others = len(states) - states.count("equal") - rounded - damaged
    parts += [f"{rounded} within the rounding of their format"] if rounded else []
    parts += [f"{damaged} hold NaN or infinity"] if damaged else []
    parts += [f"{others} {'differs' if others == 1 else 'differ'}"] if others else []
    return ", ".join(parts)


# ---- the command line of the stages that take a base


def add_base_is(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base-is",
        choices=KINDS,
        help="what the base is to the checkpoint, whatever the weights say. source: every difference is a fault; ancestor: the "
        "checkpoint was trained on from it; stranger: nothing is taken from it or held against it",
    )


def refuse_alone(options: argparse.Namespace) -> None:
    if options.base_is is not None and options.base is None:
        raise InputError(f"--base-is {options.base_is}: goes with --base SRC, of which it says what it is")
