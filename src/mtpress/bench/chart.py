"""A benchmark as a picture: speed by decode length, one panel a number of streams, and draft acceptance by position.

In: a `BenchResult`. Out: an SVG and a PNG file. Leaves out: numbers to read off; those stand in the tables. Needs matplotlib, the
extra mtpress[bench].

Colour: one hue a build, darker with more drafted tokens, so that it also reads in grey and for the colour-blind (blue, orange
and green of Okabe and Ito's palette; never red against green).
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtpress.bench.measurement import Cell, Spread
from mtpress.bench.result import BenchResult
from mtpress.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
INK, FAINT, GRID = "#222222", "#666666", "#DDDDDD"
LIGHTEST, DARKEST = 0.68, -0.42  # how far the first shade goes to white and the last to black
PANEL_INCHES, HEIGHT_INCHES = 3.5, 3.6
PNG_DPI = 200
MARKERS, BESIDE = "os^Dv", 0.05
Colour = tuple[float, float, float]
STYLE = {
    "text.parse_math": False,  # labels are names of strangers, in which a $ is a $
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": FAINT,
    "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "svg.hashsalt": "mtpress", "figure.facecolor": "white",
}  # fmt: skip


def require_matplotlib() -> None:
    """InputError, in one line, where there is none: to be asked before anything long begins."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("drawing needs matplotlib: pip install 'mtpress[bench]', or leave the picture out with --no-plot")


def draw(result: BenchResult, folder: Path, name: str = "bench") -> tuple[Path, Path]:
    """Writes name.svg and name.png into the folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        streams = sorted({cell.streams for cell in result.cells})
        shown = [number for number, summaries in enumerate(result.summaries) if summaries]
        drafted = [number for number in shown if result.spec_decode(number) is not None]
        panels = len(streams) + bool(drafted)
        figure, axes = pyplot.subplots(1, panels, figsize=(max(PANEL_INCHES * panels, 5), HEIGHT_INCHES), squeeze=False)
        colours = configuration_colours(result)
        for axis, number_of_streams in zip(axes[0], streams, strict=False):
            draw_speed(axis, result, number_of_streams, shown, colours)
        if drafted:
            draw_acceptance(axes[0][-1], result, drafted, colours)
        labels = {result.configurations[number].label: colours[number] for number in shown}
        rows = draw_legend(figure, labels, panels)
        figure.text(0.0155, 0.018, caption(result), fontsize=7, color=FAINT)
        figure.set_figheight(HEIGHT_INCHES + 0.2 * rows)
        figure.tight_layout(rect=(0, 0.075 + 0.052 * rows, 1, 1), w_pad=2.0)
        svg, png = folder / f"{name}.svg", folder / f"{name}.png"
        figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png, dpi=PNG_DPI)
        pyplot.close(figure)
    return svg, png


def draw_legend(figure: "Figure", labels: Mapping[str, Colour], panels: int) -> int:
    """Below the panels, row by row; gives the number of rows."""
    from matplotlib.patches import Rectangle

    columns = legend_columns(len(labels), panels)
    names = list(labels)
    ordered = [names[number] for number in column_major(len(names), columns)]
    handles = [Rectangle((0, 0), 1, 1, color=labels[name]) for name in ordered]
    figure.legend(
        handles, ordered, loc="lower left", ncols=columns, frameon=False, bbox_to_anchor=(0.01, 0.055),
        handlelength=1.0, handleheight=1.0, columnspacing=1.6,
    )  # fmt: skip
    return -(-len(labels) // columns)


def legend_columns(count: int, panels: int) -> int:
    """A row for each build where there are several, at most what the width holds."""
    return max(1, min(count, panels * 2, 4))


def column_major(count: int, columns: int) -> list[int]:
    """matplotlib fills a legend column by column; this order reads row by row."""
    rows = -(-count // columns)
    return [row * columns + column for column in range(columns) for row in range(rows) if row * columns + column < count]


def configuration_colours(result: BenchResult) -> list[Colour]:
    """A hue for each build, in their order; shades of it from light to dark in the order of its configurations."""
    builds = list(dict.fromkeys(configuration.build for configuration in result.configurations))
    colours = []
    for configuration in result.configurations:
        same = [other for other in result.configurations if other.build == configuration.build]
        step = same.index(configuration) / max(len(same) - 1, 1) if len(same) > 1 else 0.62
        colours.append(shade(HUES[builds.index(configuration.build) % len(HUES)], LIGHTEST + (DARKEST - LIGHTEST) * step))
    return colours


def shade(colour: str, amount: float) -> Colour:
    """amount 1: white, 0: the colour, −1: black."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    mixed = [c + (1 - c) * amount if amount > 0 else c * (1 + amount) for c in channels]
    return mixed[0], mixed[1], mixed[2]


def draw_speed(axis: "Axes", result: BenchResult, streams: int, shown: Sequence[int], colours: Sequence[Colour]) -> None:
    """Bars of total tokens/s with whiskers from the lowest to the highest round."""
    lengths = sorted({cell.length for cell in result.cells if cell.streams == streams})
    width = 0.82 / len(shown)
    for order, number in enumerate(shown):
        for place, length in enumerate(lengths):
            summary = result.summaries[number].get(Cell(length, streams))
            speed = summary.metrics["tokens_per_second"] if summary is not None else None
            if speed is None:
                continue
            at = place + (order - (len(shown) - 1) / 2) * width
            axis.bar(at, speed.median, width * 0.92, color=colours[number], zorder=2)
            draw_whisker(axis, at, speed)
    axis.set_title("1 stream" if streams == 1 else f"{streams} streams, in total")
    axis.set_xticks(range(len(lengths)), [f"{length}" for length in lengths])
    axis.set_xlabel("decode length (tokens)")
    axis.set_ylabel("speed (tokens/s)")
    draw_grid(axis)


def draw_whisker(axis: "Axes", at: float, value: Spread) -> None:
    if value.high > value.low:
        below, above = value.median - value.low, value.high - value.median
        axis.errorbar(at, value.median, [[below], [above]], color=INK, linewidth=0.9, capsize=1.8, capthick=0.9, zorder=3)


def draw_acceptance(axis: "Axes", result: BenchResult, drafted: Sequence[int], colours: Sequence[Colour]) -> None:
    """Share of drafts accepted at each position: one line a configuration, over all its cells and rounds."""
    builds = list(dict.fromkeys(configuration.build for configuration in result.configurations))
    last = 1
    for order, number in enumerate(drafted):
        counted = result.spec_decode(number)
        assert counted is not None
        shares = [100 * share for share in counted.per_position]
        aside = (order - (len(drafted) - 1) / 2) * BESIDE  # points of equal height would hide one another
        positions = [at + aside for at in range(1, len(shares) + 1)]
        last = max(last, len(shares))
        marker = MARKERS[builds.index(result.configurations[number].build) % len(MARKERS)]
        axis.plot(positions, shares, color=colours[number], marker=marker, markersize=5.5, linewidth=1.6, zorder=3, clip_on=False)
    axis.set_title("draft acceptance")
    axis.set_xticks(range(1, last + 1))
    axis.set_xlim(0.7, last + 0.3)
    axis.set_xlabel("position of the drafted token")
    axis.set_ylabel("drafts accepted there (%)")
    draw_grid(axis)
    axis.set_ylim(0, 100)


def draw_grid(axis: "Axes") -> None:
    axis.set_ylim(bottom=0)
    axis.grid(axis="y", color=GRID, linewidth=0.7, zorder=0)
    axis.tick_params(axis="both", length=0)
    axis.set_axisbelow(True)


def caption(result: BenchResult) -> str:
    machine = result.machine
    where = ", ".join(gpu["name"] for gpu in machine["gpus"]) or f"{machine['cpu']}, no GPU"
    rounds = result.settings["rounds"]
    spread = f"median of {rounds} rounds, whiskers: lowest to highest" if rounds > 1 else "one round"
    failed = [result.configurations[number].label for number, summaries in enumerate(result.summaries) if not summaries]
    lost = f" · failed: {', '.join(failed)}" if failed else ""
    return f"{where} · vLLM {result.engine} · {spread} · {result.prompts['short']}{lost}"
