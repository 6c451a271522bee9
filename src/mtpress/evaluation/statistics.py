"""Means and quantiles over tokens, with intervals that know that tokens come in documents.

In: one number a token, and the document of each. Out: `Figure`s. Leaves out: where the numbers come from.

Intervals are percentiles (2.5 and 97.5) of a bootstrap over documents: whole documents are drawn with replacement, as many as there
are, and the figure is taken of what was drawn. The draws are the same for every checkpoint of a run, so that a difference between two
is one of the same documents (paired).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Counts = NDArray[np.int64]
LEVELS = (2.5, 97.5)


@dataclass(frozen=True)
class Figure:
    """A value and its 95% interval; None where there is none, as for one document."""

    value: float
    low: float | None = None
    high: float | None = None


def draws(num_documents: int, num_resamples: int, seed: int) -> Counts:
    """int64 [resamples, documents]: how often each document was drawn."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(num_documents, np.full(num_documents, 1 / num_documents), size=num_resamples)
    return np.asarray(drawn, dtype=np.int64)


def interval(value: float, resampled: Numbers) -> Figure:
    """The value with the interval of what was resampled; NaNs, of draws that count nothing, are left out."""
    known = resampled[np.isfinite(resampled)]
    if len(known) < 2:
        return Figure(float(value))
    low, high = np.percentile(known, LEVELS)
    return Figure(float(value), float(low), float(high))


def ratio_of_sums(over: Numbers, under: Numbers, drawn: Counts) -> tuple[float, Numbers]:
    """Σ over / Σ under of per-document sums: the value, and the same of each draw. A mean over tokens has counts under it."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.divide(over.sum(), under.sum())), np.divide(drawn @ over, drawn @ under)


def figure(value: float, resampled: Numbers) -> Figure | None:
    """interval(), or None for a quotient that does not exist: nothing was counted, or it is of a KL of nothing."""
    return interval(value, resampled) if np.isfinite(value) else None


def per_document(values: Numbers, document: Counts, num_documents: int) -> Numbers:
    """The sum of each document's values."""
    return np.asarray(np.bincount(document, weights=values, minlength=num_documents))


def quantiles(values: Numbers, document: Counts, levels: Sequence[float], drawn: Counts) -> list[Figure]:
    """Smallest values that at least these shares of all tokens do not exceed, each with its interval."""
    order = np.argsort(values, kind="stable")
    ordered, of = values[order], document[order]
    shares = np.asarray(levels)

    def at(weights: Counts) -> Numbers:
        running = np.cumsum(weights)
        return np.asarray(ordered[np.searchsorted(running, np.maximum(np.ceil(shares * running[-1]), 1))])

    whole = at(np.ones(len(ordered), dtype=np.int64))
    resampled = np.array([at(times[of]) for times in drawn if times[of].any()])
    return [interval(float(value), resampled[:, i]) for i, value in enumerate(whole)]
