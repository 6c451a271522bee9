import numpy as np
import pytest

from mtpress.evaluation.statistics import Figure, draws, figure, interval, per_document, quantiles, ratio_of_sums


def test_a_mean_weighs_tokens_and_its_interval_weighs_documents() -> None:
    dice = np.random.default_rng(1)
    document = np.repeat(np.arange(200), dice.integers(1, 40, 200))
    level = dice.exponential(1.0, 200)  # documents differ, tokens of one hardly do
    values = level[document] + dice.normal(0, 0.01, len(document))
    drawn = draws(200, 2000, seed=0)
    assert drawn.shape == (2000, 200) and (drawn.sum(1) == 200).all()
    value, resampled = ratio_of_sums(per_document(values, document, 200), per_document(np.ones_like(values), document, 200), drawn)
    assert value == pytest.approx(values.mean())
    assert np.allclose(
        resampled[:20],
        [values[np.concatenate([np.flatnonzero(document == d) for d in np.repeat(np.arange(200), n)])].mean() for n in drawn[:20]],
    )
    found = interval(value, resampled)
    assert found.low is not None and found.high is not None and found.low < value < found.high
    # over tokens the interval would be far too narrow
    assert (found.high - found.low) > 3 * 3.92 * values.std() / len(values) ** 0.5


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    dice = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        sums = dice.normal(1.0, 1.0, 60)
        found = interval(*ratio_of_sums(sums, np.ones(60), draws(60, 400, seed=0)))
        assert found.low is not None and found.high is not None
        held += found.low < 1.0 < found.high
    assert 0.90 <= held / 300 <= 0.98


def test_quantiles_are_numpy_s_inverted_cdf() -> None:
    dice = np.random.default_rng(3)
    values, document = dice.exponential(1.0, 5000), np.repeat(np.arange(50), 100)
    drawn = draws(50, 200, seed=0)
    levels = (0.5, 0.99, 0.999)
    found = quantiles(values, document, levels, drawn)
    assert [figure.value for figure in found] == list(np.quantile(values, levels, method="inverted_cdf"))
    again = [np.quantile(np.repeat(values, times[document]), levels, method="inverted_cdf") for times in drawn]
    for i, each in enumerate(found):
        assert (each.low, each.high) == tuple(np.percentile(np.array(again)[:, i], (2.5, 97.5)))


def test_the_draws_are_fixed_by_their_seed_and_shared() -> None:
    assert (draws(30, 50, seed=7) == draws(30, 50, seed=7)).all()
    assert (draws(30, 50, seed=7) != draws(30, 50, seed=8)).any()
    one = np.random.default_rng(4).exponential(1.0, 30)
    drawn, ones = draws(30, 500, seed=0), np.ones(30)
    (a, of_a), (b, of_b) = ratio_of_sums(one, ones, drawn), ratio_of_sums(0.9 * one, ones, drawn)
    paired = interval(b / a, of_b / of_a)
    assert paired == Figure(pytest.approx(0.9), pytest.approx(0.9), pytest.approx(0.9))


def test_one_document_has_no_interval() -> None:
    assert interval(1.0, np.array([float("nan")])) == Figure(1.0)
    assert figure(float("inf"), np.array([1.0, 2.0])) is None
    assert figure(2.0, np.array([float("nan")])) == Figure(2.0)
