"""Scores of tasks and paired differences, held against numpy."""

import json
from typing import Any

import numpy as np
import pytest

from mtpress.evaluation.tasks.scores import Difference, Measured, Score, TasksResult, difference, measured

SETTINGS = {"tasks": ["sums"], "limit": None, "num_fewshot": None, "streams": 16, "thinking": False, "gen_kwargs": {}}


def score(task: str, value: float, stderr: float | None = 0.1, metric: str = "acc", is_group: bool = False) -> dict[str, Any]:
    return {
        "task": task, "metric": metric, "filter": "none", "value": value, "stderr": stderr, "higher_is_better": True, "num_fewshot": 0,
        "version": 1.0, "num_docs": 4, "is_group": is_group,
    }  # fmt: skip


def model(name: str, values: dict[str, list[float]], more: list[dict[str, Any]] | None = None, **subtasks: list[str]) -> Measured:
    """A model with these numbers by question in each task."""
    answer = {
        "scores": [*(score(task, float(np.mean(v))) for task, v in values.items()), *(more or [])],
        "samples": {task: {"acc,none": list(enumerate(v))} for task, v in values.items()},
        "subtasks": subtasks,
    }
    return measured(name, f"/models/{name}", json.loads(json.dumps(answer)), 1.23456)


def of(one: Measured, task: str) -> Score:
    return next(score for score in one.scores if score.task == task)


def test_a_difference_is_of_the_same_questions_and_known_better_than_the_scores() -> None:
    generator = np.random.default_rng(3)
    ours = generator.integers(0, 2, 200).astype(float)
    theirs = np.where(generator.random(200) < 0.05, 1 - ours, ours)
    base, other = model("bf16", {"sums": theirs.tolist()}), model("nvfp4", {"sums": ours.tolist()})
    found = difference(base, other, of(other, "sums"))
    assert found is not None and found.stderr is not None
    gaps = ours - theirs
    assert found.num_docs == 200
    assert found.value == pytest.approx(gaps.mean(), abs=1e-12)
    assert found.stderr == pytest.approx(gaps.std(ddof=1) / np.sqrt(200), rel=1e-12)
    apart = np.hypot(ours.std(ddof=1), theirs.std(ddof=1)) / np.sqrt(200)
    assert found.stderr < apart / 2


def test_only_questions_that_both_were_asked_count() -> None:
    base, other = model("bf16", {"sums": [1, 0, 1]}), model("nvfp4", {"sums": [0, 0]})
    assert difference(base, other, of(other, "sums")) == Difference(-0.5, 0.5, 2)


def test_one_question_has_no_standard_error() -> None:
    base, other = model("bf16", {"sums": [1]}), model("nvfp4", {"sums": [0]})
    assert difference(base, other, of(other, "sums")) == Difference(-1.0, None, 1)


def test_a_group_has_a_difference_where_it_is_the_mean_over_all_questions() -> None:
    values = {"a": [1.0, 0, 0, 0], "b": [1.0, 1]}
    zeros = {"a": [0.0] * 4, "b": [0.0] * 2}
    pooled, zero = score("both", 0.5, is_group=True), score("both", 0.0, is_group=True)
    one = model("nvfp4", values, [pooled], both=["inner"], inner=["a", "b"])
    base = model("bf16", zeros, [zero], both=["inner"], inner=["a", "b"])
    found = difference(base, one, of(one, "both"))
    assert found is not None
    assert (found.value, found.num_docs) == (0.5, 6)
    by_task = model("nvfp4", values, [score("both", 0.625, is_group=True)], both=["a", "b"])  # the mean of the tasks' means
    assert difference(base, by_task, of(by_task, "both")) is None


def test_a_score_that_is_no_mean_of_its_questions_has_no_difference() -> None:
    base, other = model("bf16", {"sums": [1, 0]}), model("nvfp4", {"sums": [1, 1]})
    corpus = measured("nvfp4", "", {"scores": [score("sums", 0.3)], "samples": {"sums": {"acc,none": [[0, 1.0]]}}, "subtasks": {}}, 1)
    assert difference(base, corpus, of(corpus, "sums")) is None
    assert difference(base, other, Score(**score("sums", 1.0, metric="f1"))) is None


def test_the_table_has_shares_in_percent_and_other_scores_as_they_are() -> None:
    perplexity = score("text", 12.3456, None, "word_perplexity")
    base, other = model("bf16", {"sums": [1, 0, 1, 0]}, [perplexity]), model("nvfp4", {"sums": [1, 0, 0, 0]}, [perplexity])
    result = TasksResult("0.4.13", SETTINGS, base, (other,), {"int4": "the engine died"})
    assert result.rows() == [
        ("sums", "acc", "4", "bf16", "50.00 ± 10.00 %", ""),
        ("sums", "acc", "4", "nvfp4", "25.00 ± 10.00 %", "-25.00 ± 25.00 %"),
        ("text", "word_perplexity", "4", "bf16", "12.35", ""),
        ("text", "word_perplexity", "4", "nvfp4", "12.35", ""),
    ]
    text = result.markdown()
    assert text.splitlines()[0] == "| task | metric | questions | model | score | Δ |"
    assert "paired" in text and "without thinking" in text
    assert text.endswith("int4: the engine died\n")


def test_json_has_every_score_and_its_difference() -> None:
    base, other = model("bf16", {"sums": [1, 0]}), model("nvfp4", {"sums": [1, 1]})
    document = json.loads(json.dumps(TasksResult("0.4.13", SETTINGS, base, (other,), {}).as_json()))
    assert "difference" not in document["base"]["scores"][0]
    assert document["checkpoints"]["nvfp4"]["scores"][0]["difference"] == {"value": 0.5, "stderr": 0.5, "num_docs": 2}
    assert document["checkpoints"]["nvfp4"]["seconds"] == 1.235


def test_without_a_base_there_is_no_difference() -> None:
    result = TasksResult("0.4.13", SETTINGS, None, (model("nvfp4", {"sums": [1, 1]}),), {})
    assert result.rows()[0][-1] == ""
    assert "paired" not in result.note
    assert result.as_json()["base"] is None
