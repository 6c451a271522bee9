import importlib.util
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from bench_results import FAILURE, result
from mtpress.bench.chart import column_major, configuration_colours, draw, require_matplotlib, shade
from mtpress.errors import InputError

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")


def luminance(colour: tuple[float, float, float]) -> float:
    red, green, blue = colour
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@needs_matplotlib
def test_svg_and_png_are_written_and_the_svg_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    svg, png = draw(result(), tmp_path)
    again, _ = draw(result(), tmp_path / "again")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert svg.read_bytes() == again.read_bytes()
    width, height = (float(value) for value in re.findall(r'(?:width|height)="([\d.]+)pt"', svg.read_text())[:2])
    assert width > 2 * height


@needs_matplotlib
@pytest.mark.parametrize(("builds", "mtp"), [(("a",), (0,)), (("a", "b", "c"), (0,)), (("a", "b"), (0, 1, 2, 3))])
def test_any_number_of_configurations_is_drawn(tmp_path: Path, builds: tuple[str, ...], mtp: tuple[int, ...]) -> None:
    svg, _ = draw(result(builds, mtp), tmp_path)
    assert ("draft acceptance" in svg.read_text()) == (len(mtp) > 1)  # text is drawn as shapes, and named in a comment


@needs_matplotlib
def test_what_failed_is_named_and_not_drawn(tmp_path: Path) -> None:
    whole = result()
    broken = replace(whole, failures=(FAILURE,), runs=tuple(run for run in whole.runs if run.configuration == 0))
    svg, _ = draw(broken, tmp_path)
    assert "failed: tiny, MTP n=2" in svg.read_text()
    assert "failed" not in draw(whole, tmp_path)[0].read_text()


def test_builds_differ_by_hue_and_drafted_tokens_by_lightness() -> None:
    colours = configuration_colours(result(("a", "b"), (0, 1, 2, 3)))
    assert len(set(colours)) == 8
    for build in (colours[:4], colours[4:]):
        lights = [luminance(colour) for colour in build]
        assert all(a - b > 0.1 for a, b in pairwise(lights)), lights


def test_shades_reach_from_white_to_black() -> None:
    assert shade("#0072B2", 1) == (1, 1, 1)
    assert shade("#0072B2", -1) == (0, 0, 0)


def test_the_legend_reads_row_by_row() -> None:
    assert column_major(8, 4) == [0, 4, 1, 5, 2, 6, 3, 7]
    assert column_major(3, 2) == [0, 2, 1]


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mtpress\[bench\]'.*--no-plot"):
        require_matplotlib()
