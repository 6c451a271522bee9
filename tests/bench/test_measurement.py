import math
from typing import Any

import numpy as np
import pytest

from mtpress.bench.measurement import Cell, CellRun, Spread, percentile, summarize, total_spec_decode
from mtpress.engine.server.metrics import SpecDecode

CELL = Cell(50, 2)


def cell_run(configuration: int = 0, round: int = 0, seconds: float = 4.0, cell: Cell = CELL, **more: Any) -> CellRun:
    fields: dict[str, Any] = {
        "ttft_seconds": (0.5, 1.0), "latency_seconds": (2.5, 4.0), "prompt_tokens": (7, 9), "output_tokens": (41, 31),
    }  # fmt: skip
    return CellRun(configuration, round, cell, seconds, **{**fields, **more})


def test_rates_of_a_cell_follow_from_its_requests() -> None:
    run = cell_run()
    assert run.tokens_per_second == (41 + 31) / 4.0
    assert run.tpot_seconds == (2.0 / 40, 3.0 / 30)
    assert run.stream_tokens_per_second == pytest.approx((41 / 2.5 + 31 / 4.0) / 2)
    assert run.decode_tokens_per_second == pytest.approx(1 / 0.075)
    assert run.num_short == 2


def test_an_answer_of_one_token_has_no_time_per_further_token() -> None:
    run = cell_run(output_tokens=(1, 1))
    assert run.tpot_seconds == ()
    assert math.isnan(run.decode_tokens_per_second)
    assert run.as_json()["metrics"]["tpot_median_seconds"] is None


@pytest.mark.parametrize("percent", [0, 50, 75, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_percentiles_are_numpys(percent: float, count: int) -> None:
    values = [float(v) for v in np.random.default_rng(count).random(count)]
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_spread_leaves_out_what_is_not_there() -> None:
    assert Spread.of([math.nan]) is None
    spread = Spread.of([3.0, math.nan, 1.0, 2.0])
    assert spread == Spread(2.0, 1.0, 3.0)
    assert spread.relative == 1.0


def test_ratios_are_taken_within_each_round() -> None:
    """Both slow down to a half in round 2: the ratio stays 2, where a ratio of all against all would be anything from 1 to 4."""
    runs = [cell_run(0, 0, 4.0), cell_run(1, 0, 2.0), cell_run(1, 1, 4.0), cell_run(0, 1, 8.0)]
    (summary,) = summarize(runs, 1, baseline=0)
    assert summary.ratios["tokens_per_second"] == Spread(2.0, 2.0, 2.0)
    assert summary.metrics["tokens_per_second"] == Spread(27.0, 18.0, 36.0)
    assert summary.num_rounds == 2
    assert summary.num_requests == 4


def test_a_round_that_the_baseline_lacks_has_no_ratio() -> None:
    runs = [cell_run(0, 0, 4.0), cell_run(1, 0, 2.0), cell_run(1, 1, 1.0)]
    (summary,) = summarize(runs, 1, baseline=0)
    assert summary.ratios["tokens_per_second"] == Spread(2.0, 2.0, 2.0)
    (alone,) = summarize(runs[1:], 1, baseline=0)
    assert alone.ratios["tokens_per_second"] is None


def test_cells_stay_apart_and_in_order() -> None:
    runs = [cell_run(cell=cell) for cell in (Cell(700, 1), Cell(50, 1), Cell(50, 64))]
    assert [summary.cell for summary in summarize(runs, 0, 0)] == [Cell(700, 1), Cell(50, 1), Cell(50, 64)]


def test_counters_are_added_not_averaged() -> None:
    large, small = SpecDecode(100, 200, 150, (90, 60)), SpecDecode(1, 3, 0, (0, 0, 0))
    total = total_spec_decode([large, None, small])
    assert total == SpecDecode(101, 203, 150, (90, 60, 0))
    assert total.acceptance_rate == 150 / 203
    assert total_spec_decode([None]) is None
