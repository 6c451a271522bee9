"""One number a token → the figures of a result.

In: `TokenFigures` and `Drafts` of the base and of each checkpoint. Out: the parts of `EvalResult`. Leaves out: where they come from
(vocabulary.py, drafts.py), how intervals are made (statistics.py).
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from torch import Tensor

from mtpress.evaluation.documents import Documents
from mtpress.evaluation.drafts import Drafts
from mtpress.evaluation.result import Acceptance, GroupFigures, Pair, PositionBin
from mtpress.evaluation.statistics import Counts, Figure, Numbers, draws, figure, interval, per_document, quantiles, ratio_of_sums
from mtpress.evaluation.vocabulary import TokenFigures

QUANTILES = (0.5, 0.99, 0.999)


class Counted:
    """The predictions that count: which tokens they are, their documents, and the draws of each group of documents."""

    def __init__(self, documents: Documents, num_resamples: int, seed: int) -> None:
        self.groups = documents.groups()
        lengths = documents.lengths
        within = [np.append(counted.numpy(), False) for counted in documents.counted]  # nothing follows the last token
        self.mask = np.concatenate(within)
        self.document = np.repeat(np.arange(len(lengths)), lengths)[self.mask]
        self.position = np.concatenate([np.arange(1, length + 1) for length in lengths])[self.mask]
        self.num_documents = len(lengths)
        self.drawn = {name: draws(len(members), num_resamples, seed) for name, members in self.groups.items()}

    def of(self, values: Tensor) -> Numbers:
        return np.asarray(values.numpy()[self.mask], dtype=np.float64)

    def finite(self, found: TokenFigures) -> bool:
        """Whether every prediction that counts has figures."""
        return all(bool(np.isfinite(self.of(values)).all()) for values in (found.kl, found.nll))

    def sums(self, values: Numbers, group: str) -> Numbers:
        """The sum of each document of a group."""
        return per_document(values, self.document, self.num_documents)[self.groups[group]]

    def mean(self, values: Numbers, group: str) -> tuple[float, Numbers]:
        return ratio_of_sums(self.sums(values, group), self.sums(np.ones_like(values), group), self.drawn[group])


def exponential(mean: tuple[float, Numbers]) -> Figure:
    return interval(float(np.exp(mean[0])), np.exp(mean[1]))


def base_perplexity(base: TokenFigures, counted: Counted) -> dict[str, Figure]:
    return {group: exponential(counted.mean(counted.of(base.nll), group)) for group in counted.groups}


def group_figures(base: TokenFigures, found: TokenFigures, counted: Counted) -> dict[str, GroupFigures]:
    """Group → the figures of one checkpoint."""
    kl, nll, agrees = counted.of(found.kl), counted.of(found.nll), counted.of(found.top1 == base.top1)
    lost = nll - counted.of(base.nll)
    made = {}
    for group, members in counted.groups.items():
        here = np.isin(counted.document, members)
        place = np.searchsorted(members, counted.document[here])
        median, p99, p999 = quantiles(kl[here], place, QUANTILES, counted.drawn[group])
        made[group] = GroupFigures(
            num_documents=len(members),
            num_tokens=int(here.sum()),
            kl_mean=interval(*counted.mean(kl, group)),
            kl_median=median,
            kl_p99=p99,
            kl_p999=p999,
            kl_max=float(kl[here].max()),
            top1_agreement=interval(*counted.mean(agrees, group)),
            perplexity=exponential(counted.mean(nll, group)),
            perplexity_ratio=exponential(counted.mean(lost, group)),
        )
    return made


def by_position(found: TokenFigures, counted: Counted) -> list[PositionBin]:
    """Mean KL in bins of positions that double in width."""
    kl, bins, first = counted.of(found.kl), [], 1
    while first <= counted.position.max():
        last = 2 * first - 1
        inside = (counted.position >= first) & (counted.position <= last)
        if inside.any():
            bins.append(PositionBin(first, last, int(inside.sum()), float(kl[inside].mean())))
        first = last + 1
    return bins


def pairs(base: TokenFigures, found: Mapping[str, TokenFigures], counted: Counted) -> list[Pair]:
    """Every two checkpoints on every group of documents."""
    made = []
    for group in counted.groups:
        for first, second in combinations(found, 2):
            kl = [counted.mean(counted.of(found[name].kl), group) for name in (first, second)]
            top1 = [counted.mean(counted.of(found[name].top1 == base.top1), group) for name in (first, second)]
            with np.errstate(invalid="ignore", divide="ignore"):
                ratio = figure(float(np.divide(kl[1][0], kl[0][0])), np.divide(kl[1][1], kl[0][1]))
            differences = [interval(b[0] - a[0], b[1] - a[1]) for a, b in (kl, top1)]
            made.append(Pair(first, second, group, ratio, *differences))
    return made


def acceptance(drafts: Drafts, base: Drafts | None, drawn: Counts) -> list[Acceptance]:
    """Per depth, over all documents. base: BF16's drafts; None for BF16 itself, and where it has none."""
    found = []
    for k, (counted, held) in enumerate(zip(drafts.counted, drafts.held, strict=True)):
        share = ratio_of_sums(_sums(held), _sums(counted), drawn)
        ratio = None
        if base is not None:
            both = [mine & theirs for mine, theirs in zip(counted, base.counted[k], strict=True)]
            ours = _sums([h & shared for h, shared in zip(held, both, strict=True)])
            theirs = _sums([h & shared for h, shared in zip(base.held[k], both, strict=True)])
            ratio = figure(*ratio_of_sums(ours, theirs, drawn))
        found.append(Acceptance(int(sum(int(c.sum()) for c in counted)), figure(*share), ratio))
    return found


def _sums(marks: Sequence[Tensor]) -> Numbers:
    return np.array([float(mark.sum()) for mark in marks])
