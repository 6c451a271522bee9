"""A result as three pictures: KL by position, error by layer and component, size against KL.

In: an `EvalResult`. Out: kl-by-position.svg, error-by-layer.svg, size-against-kl.svg. Leaves out: numbers to read off; those stand in
the tables. Drawn in the style of bench/chart.py, with the same colours, and needs matplotlib as it does (the extra mtpress[bench]).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtpress.bench.chart import FAINT, HEIGHT_INCHES, HUES, INK, MARKERS, PANEL_INCHES, STYLE, Colour, draw_grid, shade
from mtpress.evaluation.documents import ALL
from mtpress.evaluation.result import EvalResult
from mtpress.models.qwen3_5.names import COMPONENT_TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AROUND = 0.45  # how much darker a second checkpoint of a hue is than the first


def draw(result: EvalResult, folder: Path) -> tuple[Path, ...]:
    """Writes the three files into the folder, and returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {"kl-by-position": (draw_positions, 1), "error-by-layer": (draw_layers, 3), "size-against-kl": (draw_sizes, 1)}
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, (draw_panels, panels) in drawn.items():
            figure, axes = pyplot.subplots(1, panels, figsize=(max(PANEL_INCHES * panels, 5), HEIGHT_INCHES), squeeze=False)
            draw_panels(axes[0], result, colours(result))
            finish(figure, result)
            paths.append(folder / f"{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
            pyplot.close(figure)
    return tuple(paths)


def colours(result: EvalResult) -> dict[str, Colour]:
    """A hue for each checkpoint, darker where the hues begin again."""
    return {name: shade(HUES[i % len(HUES)], -AROUND * (i // len(HUES))) for i, name in enumerate(result.checkpoints)}


def finish(figure: "Figure", result: EvalResult) -> None:
    """Legend and caption below the panels."""
    from matplotlib.patches import Rectangle

    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in colours(result).values()]
    figure.legend(
        handles, list(result.checkpoints), loc="lower left", ncols=1, frameon=False, bbox_to_anchor=(0.01, 0.05), handlelength=1.0,
        handleheight=1.0,
    )  # fmt: skip
    sets = ", ".join(f"{name} ({held['num_documents']} documents)" for name, held in result.data.items())
    figure.text(0.0155, 0.018, f"against {Path(result.base.path).name} on {sets}", fontsize=7, color=FAINT)
    rows = len(handles)
    figure.set_figheight(HEIGHT_INCHES + 0.2 * rows)
    figure.tight_layout(rect=(0, 0.06 + 0.047 * rows, 1, 1), w_pad=2.0)


def draw_positions(axes: Any, result: EvalResult, hues: Mapping[str, Colour]) -> None:
    axis: Axes = axes[0]
    for i, (name, found) in enumerate(result.checkpoints.items()):
        middles = [(held.first * held.last) ** 0.5 for held in found.kl_by_position]
        means = [held.kl_mean for held in found.kl_by_position]
        axis.plot(middles, means, color=hues[name], marker=MARKERS[i % len(MARKERS)], markersize=4.5, linewidth=1.5, zorder=3)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    titled(axis, "KL by position", "position in the document (tokens)", "KL(BF16‖checkpoint), nats")


def draw_layers(axes: Any, result: EvalResult, hues: Mapping[str, Colour]) -> None:
    """Mixer (Gated DeltaNet hollow, attention filled), MLP, and what has come together."""
    for i, (name, found) in enumerate(result.checkpoints.items()):
        layers, marker = [error.layer for error in found.layers], MARKERS[i % len(MARKERS)]
        for axis, key in zip(axes, ("mixer", "mlp", "accumulated"), strict=True):
            heights = [100 * getattr(error, key) for error in found.layers]
            axis.plot(layers, heights, color=hues[name], linewidth=1.2, zorder=2)
            faces = [(*hues[name], 1) if key != "mixer" or e.component == "attention" else (1, 1, 1, 1) for e in found.layers]
            axis.scatter(layers, heights, s=22, marker=marker, color=faces, edgecolors=[hues[name]] * len(layers), zorder=3)
    hollow = f"hollow: {COMPONENT_TITLES['gdn']}, filled: {COMPONENT_TITLES['attention']}"
    for axis, (title, note) in zip(axes, (("mixer by itself", hollow), ("MLP by itself", ""), ("accumulated", "")), strict=True):
        titled(axis, title, f"layer{f' ({note})' if note else ''}", "relative error of the output (%)")
        axis.xaxis.get_major_locator().set_params(integer=True)


def draw_sizes(axes: Any, result: EvalResult, hues: Mapping[str, Colour]) -> None:
    axis: Axes = axes[0]
    largest = max(found.num_bytes for found in result.checkpoints.values())
    unit, name_of_unit = (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    for i, (name, found) in enumerate(result.checkpoints.items()):
        kl, at = found.groups[ALL].kl_mean, found.num_bytes / unit
        if kl.low is not None and kl.high is not None:
            below, above = max(kl.value - kl.low, 0), max(kl.high - kl.value, 0)
            axis.errorbar(at, kl.value, [[below], [above]], color=INK, linewidth=0.9, capsize=2, zorder=2)
        axis.scatter([at], [kl.value], s=34, marker=MARKERS[i % len(MARKERS)], color=[hues[name]], zorder=3)
    axis.set_xlim(0, 1.08 * largest / unit)
    titled(axis, "size against KL", f"checkpoint ({name_of_unit})", "mean KL(BF16‖checkpoint), nats")


def titled(axis: "Axes", title: str, across: str, up: str) -> None:
    axis.set_title(title)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    draw_grid(axis)
