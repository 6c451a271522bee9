"""What a trial works out of the engine's answers: where texts part, and how far logits are apart."""

import math

import pytest

from mtpress.engine.trial.trial import Story, closeness, differences

LOG = math.log


def story(tokens: tuple[int, ...], candidates: tuple[dict[int, float], ...] | None = None) -> Story:
    return Story((1, 2), tokens, candidates or tuple({token: -0.1} for token in tokens))


def test_equal_texts_do_not_differ() -> None:
    assert list(differences([story((5, 6, 7))], [story((5, 6, 7))])) == []


def test_the_first_other_token_and_the_larger_preference_are_told() -> None:
    plain = story((5, 6, 7), ({5: -0.1}, {6: -0.5, 8: -0.75}, {7: -0.1}))
    drafted = story((5, 8, 9), ({5: -0.1}, {8: -0.6, 6: -0.7}, {9: -0.1}))
    (found,) = differences([story((1,)), plain], [story((1,)), drafted])
    assert (found.story, found.position) == (1, 1)
    assert found.margin == pytest.approx(0.25)


def test_a_token_that_is_no_candidate_of_the_other_run_is_no_near_tie() -> None:
    (found,) = differences([story((5,), ({5: -0.1},))], [story((6,), ({6: -0.1},))])
    assert found.margin == math.inf


def test_a_text_that_stops_early_differs() -> None:
    (found,) = differences([story((5, 6))], [story((5,))])
    assert (found.position, found.margin) == (1, math.inf)


def test_closeness_is_the_divergence_of_the_base_from_the_checkpoint() -> None:
    base = ({5: LOG(0.5), 6: LOG(0.5)}, {7: LOG(0.9), 8: LOG(0.1)})
    own = ({5: LOG(0.25), 6: LOG(0.75)}, {7: LOG(0.9), 8: LOG(0.1)})
    seen = closeness([base], [own])
    assert seen is not None
    expected = 0.5 * LOG(0.5 / 0.25) + 0.5 * LOG(0.5 / 0.75)
    assert seen.num_tokens == 2
    assert seen.largest_kl == pytest.approx(expected)
    assert seen.mean_kl == pytest.approx(expected / 2)
    assert seen.top1_agreement == 0.5


def test_a_token_that_the_checkpoint_does_not_list_counts_as_its_last() -> None:
    seen = closeness([({5: LOG(0.9), 9: LOG(0.1)},)], [({5: LOG(0.9), 6: LOG(0.01)},)])
    assert seen is not None
    assert seen.mean_kl == pytest.approx(0.1 * LOG(0.1 / 0.01))


def test_an_engine_that_died_half_way_is_compared_as_far_as_it_came() -> None:
    whole, half = [story((5, 6)), story((7,))], [story((5, 6))]
    assert list(differences(whole, half)) == []
    scored = ({5: LOG(0.9)}, {6: LOG(0.9)})
    seen = closeness([scored], [scored, ({7: LOG(0.9)},)])
    assert seen is not None
    assert (seen.num_tokens, seen.mean_kl) == (2, 0)
    assert closeness([()], [()]) is None
