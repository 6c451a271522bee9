"""Rules on the scales of activations, by the weights that make these: no comparison can find them, since a source has none.

NVFP4 rounds blocks of 16 under scales of their own: inputs far below the largest lose nothing until their block scale leaves E4M3's
normal range, at 1/28672 of the largest. So a scale that is too large costs little for long, and one that is too small clips at once.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterator

from mtpress.comparison.scale_bounds import Bounds, ScaleBounds
from mtpress.rules.rule import QUANTIZE_AGAIN, Problem, Rule
from mtpress.terminal import count

MEASURE = "measure it again: " + QUANTIZE_AGAIN
FAR_ABOVE = 64.0  # times what the weights allow: some 200 times what samples show
BELOW_OTHERS, FEWEST = 30.0, 3  # of the same linear in other layers, each relative to its own lower bound
ABOVE = 2.0  # rounding of a norm and of its input


def scale_too_small(found: ScaleBounds) -> Iterator[Problem]:
    """Below what the weights make in any one token, or far below the same linear of other layers."""
    low = {name: b for name, b in found.bounds.items() if b.amax < b.low}
    if low:
        worst = min(low, key=lambda name: low[name].amax / low[name].low)
        yield Problem(f"{count(len(low), 'scale')} too small, as {_told(worst, low[worst], 'at least', low[worst].low)}", tuple(low))
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, b in found.bounds.items():
        if b.low > 0:
            kinds[b.kind][name] = b.amax / b.low
    for kind, ratios in kinds.items():
        middle = statistics.median(ratios.values())
        odd = tuple(name for name, ratio in ratios.items() if ratio * BELOW_OTHERS < middle and name not in low)
        if odd and len(ratios) >= FEWEST:
            yield Problem(f"{count(len(odd), 'scale')} of {kind} more than {BELOW_OTHERS:.0f} times smaller than in other layers", odd)


def scale_too_large(found: ScaleBounds) -> Iterator[Problem]:
    high = {name: b for name, b in found.bounds.items() if b.amax > FAR_ABOVE * b.high and b.amax > _default(name)}
    if high:
        worst = max(high, key=lambda name: high[name].amax / high[name].high)
        yield Problem(f"{count(len(high), 'scale')} too large, as {_told(worst, high[worst], 'at most', high[worst].high)}", tuple(high))


def scale_large(found: ScaleBounds) -> Iterator[Problem]:
    high = {name: b for name, b in found.bounds.items() if ABOVE * b.high < b.amax <= FAR_ABOVE * b.high and b.amax > _default(name)}
    if high and not found.constant:
        worst = max(high, key=lambda name: high[name].amax / high[name].high)
        yield Problem(f"{count(len(high), 'scale')} large, as {_told(worst, high[worst], 'at most', high[worst].high)}", tuple(high))


def _default(name: str) -> float:
    """448, which the scale 1 stands for, is what vLLM takes for a cache without scales."""
    return 448.0 if name.endswith(("k_scale", "v_scale")) else 0.0


def _told(name: str, bounds: Bounds, word: str, limit: float) -> str:
    return f"{name}: it stands for {bounds.amax:.3g}, the weights make {word} {limit:.3g}"


RULES = (
    Rule(
        "scale-too-small",
        "error",
        "A scale of inputs, or of the KV cache, is below what the weights make in any text: everything larger is clipped.",
        MEASURE,
        scale_too_small,
    ),
    Rule(
        "scale-too-large",
        "error",
        f"A scale of inputs, or of the KV cache, is more than {FAR_ABOVE:.0f} times above what the weights can make: most numbers round to "
        "zero or to a few steps.",
        MEASURE,
        scale_too_large,
    ),
    Rule(
        "scale-large",
        "warning",
        "A scale of inputs, or of the KV cache, is above what the weights can make: no samples show that. It costs little.",
        MEASURE,
        scale_large,
    ),
)
