"""What `mtpress eval` found, as plain data; and as a document in Markdown.

In: figures (figures.py). Out: `EvalResult`, its JSON, its Markdown. Leaves out: pictures (plots.py). KL in nats, sizes in bytes.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mtpress.evaluation.documents import Disjointness
from mtpress.evaluation.layers import LayerError
from mtpress.evaluation.statistics import Figure
from mtpress.models.qwen3_5.names import COMPONENT_TITLES
from mtpress.progress import human_bytes

BASE = "BF16"


@dataclass(frozen=True)
class GroupFigures:
    """A checkpoint on one group of documents. perplexity_ratio: to BF16's on the same tokens."""

    num_documents: int
    num_tokens: int
    kl_mean: Figure
    kl_median: Figure
    kl_p99: Figure
    kl_p999: Figure
    kl_max: float
    top1_agreement: Figure
    perplexity: Figure
    perplexity_ratio: Figure


@dataclass(frozen=True)
class Acceptance:
    """Drafts of one depth that hold. share: of the body's own positions, None where no position counts; ratio: to BF16's, on the
    positions that count for both, None where there are none and for BF16 itself."""

    num_positions: int
    share: Figure | None
    ratio: Figure | None


@dataclass(frozen=True)
class PositionBin:
    """Mean KL of the tokens at positions first to last of their documents, counted from 1."""

    first: int
    last: int
    num_tokens: int
    kl_mean: float


@dataclass(frozen=True)
class BaseFigures:
    """acceptance: None with the reason in no_acceptance."""

    path: str
    num_bytes: int
    perplexity: dict[str, Figure]
    acceptance: list[Acceptance] | None
    no_acceptance: str | None


@dataclass(frozen=True)
class CheckpointFigures:
    """forms: title of a quantized form → modules. acceptance: None with the reason in no_acceptance."""

    path: str
    num_bytes: int
    forms: dict[str, int]
    kv_cache: str
    groups: dict[str, GroupFigures]
    kl_by_position: list[PositionBin]
    layers: list[LayerError]
    acceptance: list[Acceptance] | None
    no_acceptance: str | None
    disjointness: Disjointness


@dataclass(frozen=True)
class Pair:
    """Two checkpoints on the same draws of documents. kl_ratio: mean KL of second / first; the others: second − first.

    kl_ratio is None where the first has no KL.
    """

    first: str
    second: str
    group: str
    kl_ratio: Figure | None
    kl_difference: Figure
    top1_difference: Figure


@dataclass(frozen=True)
class EvalResult:
    """Everything `mtpress eval` knows. data: set → documents and tokens; settings: what the figures depend on."""

    base: BaseFigures
    checkpoints: dict[str, CheckpointFigures]
    pairs: list[Pair]
    data: dict[str, dict[str, int]]
    settings: dict[str, Any]
    seconds: float
    peak_memory_bytes: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def bodies(self) -> "dict[str, BaseFigures | CheckpointFigures]":
        """BF16 and the checkpoints, by the names they are shown under."""
        return {BASE: self.base, **self.checkpoints}

    @property
    def num_shared(self) -> int:
        """Documents that a checkpoint may have been calibrated on."""
        return max(found.disjointness.shared for found in self.checkpoints.values())


def number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}"


def shown(figure: Figure | None, digits: int = 4, scale: float = 1.0) -> str:
    """As "0.0123 [0.0111, 0.0140]", a dash where there is none."""
    if figure is None:
        return "–"
    value = number(scale * figure.value, digits)
    if figure.low is None or figure.high is None:
        return value
    return f"{value} [{number(scale * figure.low, digits)}, {number(scale * figure.high, digits)}]"


def table(headings: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings), *("| " + " | ".join(row) + " |" for row in rows), ""]


HEADINGS = ["checkpoint", "bytes", "KL mean", "median", "p99", "p99.9", "max", "top-1 the same, %", "perplexity", "÷ BF16's"]


def group_rows(result: EvalResult, group: str) -> list[list[str]]:
    """BF16 first, then each checkpoint."""
    base = result.base
    rows = [[BASE, human_bytes(base.num_bytes), *["0"] * 5, "100", shown(base.perplexity[group]), "1"]]
    for name, found in result.checkpoints.items():
        figures = found.groups[group]
        rows.append([
            name, human_bytes(found.num_bytes), shown(figures.kl_mean), number(figures.kl_median.value), shown(figures.kl_p99),
            shown(figures.kl_p999), number(figures.kl_max), shown(figures.top1_agreement, scale=100), number(figures.perplexity.value),
            shown(figures.perplexity_ratio),
        ])  # fmt: skip
    return rows


BRIEF_HEADINGS = ["checkpoint", "bytes", "KL mean", "p99", "top-1 the same, %", "perplexity ÷ BF16's"]


def brief_rows(result: EvalResult, group: str) -> Iterator[list[str]]:
    """What goes into a terminal's width."""
    for name, found in result.checkpoints.items():
        figures = found.groups[group]
        yield [
            name, human_bytes(found.num_bytes), shown(figures.kl_mean, 3), number(figures.kl_p99.value, 3),
            number(100 * figures.top1_agreement.value), number(figures.perplexity_ratio.value),
        ]  # fmt: skip


def acceptance_rows(result: EvalResult) -> list[list[str]]:
    rows = []
    for name, found in result.bodies.items():
        if found.acceptance is None:
            rows.append([name, f"not measured: {found.no_acceptance}"])
            continue
        cells = [
            shown(at.share, scale=100) + (f"; ×{shown(at.ratio)}" if at.ratio is not None else "") for at in found.acceptance
        ]  # fmt: skip
        rows.append([name, *cells])
    return rows


def pair_rows(result: EvalResult, group: str | None = None) -> list[list[str]]:
    """Of one group of documents, or of all of them."""
    chosen = [pair for pair in result.pairs if group is None or pair.group == group]
    return [[p.group, f"{p.second} ÷ {p.first}", shown(p.kl_ratio), shown(p.top1_difference, scale=100)] for p in chosen]


def layer_rows(found: CheckpointFigures) -> list[list[str]]:
    return [
        [str(e.layer), COMPONENT_TITLES[e.component], *(number(100 * x, 3) for x in (e.mixer, e.mlp, e.layer_output, e.accumulated))]
        for e in found.layers
    ]


def markdown(result: EvalResult) -> str:
    return "\n".join(_lines(result))


def _lines(result: EvalResult) -> Iterator[str]:
    settings = result.settings
    yield from (f"# Against {result.base.path}", "")
    for group in result.base.perplexity:
        one = next(iter(result.checkpoints.values())).groups[group]
        yield from (f"## {group}: {one.num_documents} documents, {one.num_tokens:,} predictions", "")
        yield from table(HEADINGS, group_rows(result, group))
    yield from ("## Drafts accepted, % of positions (teacher-forced; × to BF16 on shared positions)", "")
    depth = max((len(found.acceptance or []) for found in result.bodies.values()), default=0)
    yield from table(["checkpoint", *(f"position {k}" for k in range(1, max(depth, 1) + 1))], acceptance_rows(result))
    if result.pairs:
        yield from ("## Between checkpoints, on the same documents", "")
        yield from table(["documents", "which", "KL mean, ratio", "top-1, points"], pair_rows(result))
    for name, found in result.checkpoints.items():
        yield from (f"## Error by layer, %: {name}", "")
        yield from table(["layer", "mixer", "mixer error", "MLP error", "layer error", "accumulated"], layer_rows(found))
    for name, found in result.checkpoints.items():
        forms = ", ".join(f"{n} {form}" for form, n in found.forms.items()) or "BF16"
        yield f"- {name}: {forms}; KV cache {found.kv_cache}; {found.disjointness.said}."
    yield from ("", f"KL in nats. Intervals: 95%, {settings['resamples']} draws of whole documents, seed {settings['seed']}.", "")
