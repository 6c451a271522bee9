"""Rules on a comparison with the source: what was kept is equal, what was quantized is near."""

import statistics
from collections.abc import Iterator

from mtpress.comparison import Comparison
from mtpress.models.qwen3_5 import MTP_PREFIX
from mtpress.rules.rule import QUANTIZE_AGAIN, Problem, Rule, count

# NVFP4 by "max" gives 0.095 on normal weights, and 0.08 to 0.12 on trained ones; INT4 in groups of 128, plainly rounded, 0.117 on normal
# weights and 0.11 to 0.13 on trained ones. Twice that is no rounding.
LARGEST_ERROR, LARGEST_INT4_ERROR = 0.2, 0.25
LARGEST_FP8_ERROR = 0.06  # E4M3 has three bits of mantissa: 0.026 on normal weights, 0.025 to 0.027 on trained ones
NUM_MADS, LEAST_DISTANCE = 10.0, 0.15  # an outlier is both: far by the spread of the others, and by 15 % of the median
LEAST_ERROR = 0.105  # nor is one that is as near as "max" brings it: scales by the local Hessian give up some error for better outputs
LEAST_INT4_DISTANCE = 0.4  # a group of 128 follows the tails of its matrix: 0.09 to 0.13 in one model, where a block of 16 gives 0.095
FEW_IN_BF16 = "where they are few, mtpress repair CKPT OUT --base SRC puts them in BF16; else " + QUANTIZE_AGAIN


def mtp_differs(found: Comparison) -> Iterator[Problem]:
    names = tuple(name for name in found.differing if name.startswith(MTP_PREFIX))
    if names:
        yield Problem(f"{count(len(names), 'tensor')} of the draft head not bit for bit the source's", names)


def kept_differs(found: Comparison) -> Iterator[Problem]:
    names = tuple(name for name in found.differing if not name.startswith(MTP_PREFIX))
    if names:
        yield Problem(f"{count(len(names), 'tensor')} in BF16 not bit for bit the source's", names)


def base_lacks(found: Comparison) -> Iterator[Problem]:
    if found.absent:
        yield Problem(
            f"{count(len(found.absent), 'tensor')} without a counterpart of equal dtype and shape in the source", tuple(found.absent)
        )


def not_compared(found: Comparison) -> Iterator[Problem]:
    if found.not_compared:
        yield Problem(
            f"{count(len(found.not_compared), 'module')} that cannot be compared: not whole, or not of a known format",
            tuple(found.not_compared),
        )


def blocks_broken(found: Comparison) -> Iterator[Problem]:
    if found.broken_blocks:
        blocks = sum(found.broken_blocks.values())
        message = (
            f"{count(blocks, 'block scale')} in {count(len(found.broken_blocks), 'module')} NaN, infinite, negative, or zero over weights"
        )
        yield Problem(message, tuple(found.broken_blocks))


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
    names = _worst_first(found, [name for name in found.error if not is_near(found, name)])
    if names:
        limit = min(_largest(found, name) for name in names)
        message = f"{count(len(names), 'matrix' if len(names) == 1 else 'matrice')} further than {limit} from the source"
        yield Problem(f"{message}; the worst {found.error[names[0]]:.4g}", names)


def error_outlier(found: Comparison) -> Iterator[Problem]:
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
        "mtp-differs",
        "error",
        "The draft head is not the source's, bit for bit.",
        "mtpress graft CKPT OUT --from BASE; a head trained anew is checked against its own source",
        mtp_differs,
    ),
    Rule(
        "kept-differs",
        "error",
        "A tensor kept in BF16 is not the source's, bit for bit.",
        "mtpress repair CKPT OUT --base SRC",
        kept_differs,
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
        "Block scales are NaN, infinite or, of NVFP4, negative, or zero where the source has weights.",
        FEW_IN_BF16,
        blocks_broken,
    ),
    Rule(
        "error-large",
        "error",
        f"A quantized matrix is further than {LARGEST_ERROR} from its source, of INT4 {LARGEST_INT4_ERROR}, of FP8 {LARGEST_FP8_ERROR} "
        "(‖w − ŵ‖/‖w‖; NVFP4 gives about 0.1, INT4 in groups of 128 about 0.12, FP8 0.03): not its source, or not its scales.",
        FEW_IN_BF16,
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
