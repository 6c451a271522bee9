"""Rules on a comparison with the base: what was kept is equal, what was quantized is near; by what the base is to the checkpoint.

Against its source every difference is a finding of its own. Against an ancestor a difference is training: it is told in one note, and what
no training does stays an error. Against a stranger nothing can be said.
"""

import statistics
from collections.abc import Iterable, Iterator

from mtpress.comparison.relation import State
from mtpress.comparison.weights import LARGEST_ERROR, LARGEST_FP8_ERROR, LARGEST_INT4_ERROR, Comparison
from mtpress.models.qwen3_5.names import MTP_PREFIX
from mtpress.rules.rule import QUANTIZE_AGAIN, Problem, Rule
from mtpress.terminal import count

NUM_MADS, LEAST_DISTANCE = 10.0, 0.15  # an outlier is both: far by the spread of the others, and by 15 % of the median
LEAST_ERROR = 0.105  # nor is one that is as near as "max" brings it: scales by the local Hessian give up some error for better outputs
LEAST_INT4_DISTANCE = 0.4  # a group of 128 follows the tails of its matrix: 0.09 to 0.13 in one model, where a block of 16 gives 0.095
FEW_IN_BF16 = "mtpress repair CKPT OUT --base SRC puts them in BF16; or " + QUANTIZE_AGAIN


IF_TRAINED = "; if it was trained so: --base-is ancestor"


def base_ancestor(found: Comparison) -> Iterator[Problem]:
    """What differs from an ancestor, in one sentence; whether it is what was trained cannot be told."""
    if found.kind != "ancestor":
        return
    assert found.relation is not None
    far = [module for module in found.error if not is_near(found, module)]
    where = (*_of_state(found, found.differing, ("changed", "altered")), *_of_state(found, far, ("changed",)), *found.grown)
    head = sum(name.startswith(MTP_PREFIX) for name in where)
    others = [f"{head} of them of the draft head"] * bool(head)
    shown = [str(difference) for difference in found.differences[:3]]
    others += [f"{count(len(found.differences), 'setting')} otherwise ({'; '.join(shown)})"] * bool(shown)
    told = "".join(f", {other}" for other in others)
    yield Problem(
        f"{found.relation.why}; {count(len(where), 'tensor')} could not be verified{told}",
        (*where, *map(str, found.differences)),
    )


def base_stranger(found: Comparison) -> Iterator[Problem]:
    if found.kind == "stranger":
        assert found.relation is not None
        yield Problem(found.relation.why)


def _of_state(found: Comparison, names: Iterable[str], states: tuple[State, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if found.closeness[name].state in states)


def not_finite(found: Comparison) -> Iterator[Problem]:
    if found.kind != "stranger" and found.not_finite:
        numbers = sum(found.not_finite.values())
        yield Problem(f"{count(numbers, 'number')} in {count(len(found.not_finite), 'tensor')} NaN or infinite", tuple(found.not_finite))


def mtp_differs(found: Comparison) -> Iterator[Problem]:
    names = _differing(found, found.kind == "source", True)
    if names:
        yield Problem(f"{count(len(names), 'tensor')} of the draft head not bit for bit the source's", names)


def kept_differs(found: Comparison) -> Iterator[Problem]:
    names = _differing(found, found.kind == "source", False)
    if names:
        yield Problem(f"{count(len(names), 'tensor')} in 16 or 32 bits not bit for bit the source's", names)


def _differing(found: Comparison, asked: bool, head: bool) -> tuple[str, ...]:
    """The kept tensors of the draft head, or of the rest, that differ and are finite."""
    names = [name for name in found.differing if name.startswith(MTP_PREFIX) == head and name not in found.not_finite]
    return tuple(names) if asked else ()


def kept_unrelated(found: Comparison) -> Iterator[Problem]:
    """Of a model that was trained on: what training does not make of the ancestor's."""
    names = _of_state(found, found.differing, ("unrelated", "rescaled")) if found.kind == "ancestor" else ()
    if names:
        yield Problem(f"{count(len(names), 'tensor')} that have nothing of the ancestor's, or are a multiple of it", names)


def tokens_moved(found: Comparison) -> Iterator[Problem]:
    """Against the source tokenizer-differs says it."""
    if found.kind == "ancestor" and found.moved_tokens:
        number, first = len(found.moved_tokens), found.moved_tokens[0]
        yield Problem(f"{count(number, 'token')} under another id, and the rows of the embeddings not: {first}", tuple(found.moved_tokens))


def rows_zeroed(found: Comparison) -> Iterator[Problem]:
    """Of what is near as a whole; a matrix that is zero altogether is kept-unrelated or error-large."""
    zeroed = {name: close.rows_zeroed for name, close in found.closeness.items() if close.rows_zeroed and close.state != "unrelated"}
    if zeroed and found.kind == "ancestor":
        rows, tensors = sum(zeroed.values()), count(len(zeroed), "tensor")
        yield Problem(f"{count(rows, 'row')} of {tensors} zero where the ancestor has weights", tuple(zeroed))


def base_lacks(found: Comparison) -> Iterator[Problem]:
    if found.absent and found.kind != "stranger":
        yield Problem(
            f"{count(len(found.absent), 'tensor')} without a counterpart of equal dtype and shape in the source", tuple(found.absent)
        )


def not_compared(found: Comparison) -> Iterator[Problem]:
    if found.not_compared and found.kind != "stranger":
        yield Problem(
            f"{count(len(found.not_compared), 'module')} that cannot be compared: not whole, or not of a known format",
            tuple(found.not_compared),
        )


def blocks_broken(found: Comparison) -> Iterator[Problem]:
    if found.broken_blocks and found.kind != "stranger":
        blocks, modules = sum(found.broken_blocks.values()), count(len(found.broken_blocks), "module")
        yield Problem(f"{count(blocks, 'block scale')} in {modules} NaN, infinite or negative", tuple(found.broken_blocks))


def blocks_empty(found: Comparison) -> Iterator[Problem]:
    if found.empty_blocks and found.kind == "source":
        blocks, modules = sum(found.empty_blocks.values()), count(len(found.empty_blocks), "module")
        yield Problem(f"{count(blocks, 'block scale')} in {modules} zero where the source has weights", tuple(found.empty_blocks))


def channels_lost(found: Comparison) -> Iterator[Problem]:
    """In a matrix that is near as a whole; of one that is far error-large says it all."""
    lost = {name: number for name, number in found.lost_channels.items() if found.kind == "source" and is_near(found, name)}
    if lost:
        channels, modules = sum(lost.values()), count(len(lost), "quantized matrix" if len(lost) == 1 else "quantized matrice")
        yield Problem(f"{count(channels, 'row or column')} in {modules} with nothing of the source's", tuple(lost))


def _worst_first(found: Comparison, names: list[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: -found.error[name]))


def is_near(found: Comparison, module: str) -> bool:
    """Whether a quantized matrix is as near to its source as rounding brings it."""
    return found.error[module] <= _largest(found, module)


def _largest(found: Comparison, module: str) -> float:
    if module in found.fp8:
        return LARGEST_FP8_ERROR
    return LARGEST_INT4_ERROR if module in found.int4 else LARGEST_ERROR


def error_large(found: Comparison) -> Iterator[Problem]:
    """Of an ancestor only what no training does: a multiple of its matrix, or nothing of it."""
    if found.kind == "stranger":
        return
    far = [name for name in found.error if not is_near(found, name)]
    if found.kind == "ancestor":
        far = [name for name in far if found.closeness[name].state in ("rescaled", "unrelated")]
    names = _worst_first(found, far)
    if names:
        limit = min(_largest(found, name) for name in names)
        message = f"{count(len(names), 'matrix' if len(names) == 1 else 'matrice')} further than {limit} from the {found.kind}"
        yield Problem(f"{message}; the worst {found.error[names[0]]:.4g}", names)


def error_outlier(found: Comparison) -> Iterator[Problem]:
    if found.kind != "source":
        return
    near = {name for name in found.error if is_near(found, name)}
    for members, distance in (
        (near - found.int4 - found.fp8, LEAST_DISTANCE),
        (near & found.int4, LEAST_INT4_DISTANCE),
        (near & found.fp8, LEAST_DISTANCE),
    ):
        errors = {name: error for name, error in found.error.items() if name in members}
        if len(errors) < 4:
            continue
        median = statistics.median(errors.values())
        spread = 1.4826 * statistics.median(abs(error - median) for error in errors.values())
        limit = max(median + max(NUM_MADS * spread, distance * median), LEAST_ERROR)
        names = _worst_first(found, [name for name, error in errors.items() if error > limit])
        if names:
            message = f"{count(len(names), 'matrix' if len(names) == 1 else 'matrice')} much further from the source than the others"
            yield Problem(f"{message}: up to {found.error[names[0]]:.4g}, the median is {median:.4g}", names)


RULES = (
    Rule(
        "base-ancestor",
        "note",
        "The base is not the source: matrices that were kept are near its own and unequal, as training, ablation or a merge leave them. "
        "What differs cannot be verified.",
        "nothing needs to be done; to verify all of it, name the 16-bit checkpoint that this one was made from",
        base_ancestor,
    ),
    Rule(
        "base-stranger",
        "error",
        "The base is another model: other shapes, or nothing in common. Nothing was verified.",
        "name the checkpoint that this one was made from; if this is it, --base-is source",
        base_stranger,
    ),
    Rule(
        "not-finite",
        "error",
        "A tensor kept in 16 or 32 bits holds NaN or infinity.",
        "mtpress repair CKPT OUT --base SRC puts the base's numbers in the place of these",
        not_finite,
    ),
    Rule(
        "mtp-differs",
        "error",
        "The draft head is not the source's, bit for bit.",
        "mtpress graft CKPT OUT --from BASE --replace-head; a head that was trained is checked against its own source",
        mtp_differs,
    ),
    Rule(
        "kept-differs",
        "error",
        "A tensor kept in 16 or 32 bits is not the source's, bit for bit.",
        "if it is damaged: mtpress repair CKPT OUT --base SRC --base-is source" + IF_TRAINED,
        kept_differs,
    ),
    Rule(
        "kept-unrelated",
        "warning",
        "The base is an ancestor, and a kept tensor has nothing of it or is a multiple of it: trained anew, or damaged.",
        "look at it: mtpress check CKPT --base with the checkpoint that this one was made from tells",
        kept_unrelated,
    ),
    Rule(
        "tokens-moved",
        "error",
        "The base is an ancestor, and the tokenizer has tokens under other ids, while the rows of the embeddings are where they were: the "
        "model reads other words than were typed.",
        "put the tokenizer back that the model was trained with: it is not the one of these embeddings",
        tokens_moved,
    ),
    Rule(
        "rows-zeroed",
        "warning",
        "The base is an ancestor, and rows are zero where it has weights: tokens or channels were pruned, or lost.",
        "look at it: mtpress check CKPT --base with the checkpoint that this one was made from tells",
        rows_zeroed,
    ),
    Rule(
        "base-lacks",
        "warning",
        "Tensors have no counterpart in the source, so nothing can be said of them.",
        "name the source that the checkpoint was made from",
        base_lacks,
    ),
    Rule(
        "not-compared",
        "note",
        "Quantized modules that are not compared: FP8 other than modelopt's, INT8, or parts that do not fit together.",
        "nothing can be done here",
        not_compared,
    ),
    Rule(
        "blocks-broken",
        "error",
        "Block scales are NaN, infinite or, of NVFP4, negative.",
        FEW_IN_BF16,
        blocks_broken,
    ),
    Rule(
        "blocks-empty",
        "error",
        "Block scales are zero where the source has weights.",
        QUANTIZE_AGAIN,
        blocks_empty,
    ),
    Rule(
        "channels-lost",
        "error",
        "Rows or columns of a quantized matrix have nothing of the source's, though the matrix as a whole is near: they were zeroed or "
        "overwritten.",
        FEW_IN_BF16 + IF_TRAINED,
        channels_lost,
    ),
    Rule(
        "error-large",
        "error",
        f"A quantized matrix is further than {LARGEST_ERROR} from its source, of INT4 {LARGEST_INT4_ERROR}, of FP8 {LARGEST_FP8_ERROR} "
        "(‖w − ŵ‖/‖w‖; NVFP4 gives about 0.1, INT4 in groups of 128 about 0.12, FP8 0.03): not its source, or not its scales.",
        QUANTIZE_AGAIN + IF_TRAINED,
        error_large,
    ),
    Rule(
        "error-outlier",
        "warning",
        f"A quantized matrix is {LEAST_DISTANCE:.0%}, of INT4 {LEAST_INT4_DISTANCE:.0%}, and {NUM_MADS:.0f} median deviations further "
        "from its source than the median matrix.",
        "look at it: outliers in a few channels, or another global scale than its group's",
        error_outlier,
    ),
)
