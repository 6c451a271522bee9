"""What served models scored on tasks, with standard errors, and how far from the base on the same questions.

In: the driver's answers (driver.py). Out: `TasksResult`, its JSON, its tables. Leaves out: asking.

The standard error of a score says how much it would change with other questions of the kind. Two models were asked the same ones, so
their difference is known better than that: its standard error is of the mean of differences by question d_i (paired),

    sqrt(Σ (d_i − d)² / (n (n − 1)))

A score has a difference where it is the mean of one number a question; groups where they are the mean over all their questions.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

CLOSE = 1e-9
HEADINGS = ("task", "metric", "questions", "model", "score", "Δ")
Values = Mapping[int, float]  # number of the question → what it scored


@dataclass(frozen=True)
class Score:
    """One metric of one task. filter: how lm-eval takes the answer out of the text; stderr: None where lm-eval gives none."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    num_fewshot: int | None
    version: Any
    num_docs: int | None
    is_group: bool

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.metric, self.filter

    @property
    def title(self) -> str:
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"


@dataclass(frozen=True)
class Difference:
    """Mean difference to the base over the questions that both were asked."""

    value: float
    stderr: float | None
    num_docs: int


@dataclass(frozen=True)
class Measured:
    """One served model. served: its directory or address; samples: task → "metric,filter" → Values; subtasks: of groups."""

    name: str
    served: str
    scores: tuple[Score, ...]
    samples: Mapping[str, Mapping[str, Values]] = field(repr=False)
    subtasks: Mapping[str, Sequence[str]]
    seconds: float

    def values(self, score: Score) -> dict[tuple[str, int], float] | None:
        """Of each question what the score is the mean of; None where it is no such mean."""
        found = {
            (task, number): value
            for task in self._tasks(score.task)
            for number, value in self.samples.get(task, {}).get(f"{score.metric},{score.filter}", {}).items()
        }
        same = bool(found) and math.isclose(fmean(found.values()), score.value, rel_tol=CLOSE, abs_tol=CLOSE)
        return found if same else None

    def _tasks(self, name: str) -> Iterator[str]:
        if name in self.samples:
            yield name
        for below in self.subtasks.get(name, ()):
            if below != name:
                yield from self._tasks(below)


def measured(name: str, served: str, answer: Mapping[str, Any], seconds: float) -> Measured:
    """The driver's answer."""
    return Measured(
        name,
        served,
        tuple(Score(**score) for score in answer["scores"]),
        {task: {key: dict(pairs) for key, pairs in metrics.items()} for task, metrics in answer["samples"].items()},
        answer["subtasks"],
        round(seconds, 3),
    )


def difference(base: Measured, other: Measured, score: Score) -> Difference | None:
    """other's score less the base's, over the same questions; None where there is no such thing."""
    twin = next((one for one in base.scores if one.key == score.key), None)
    if twin is None or (theirs := base.values(twin)) is None or (ours := other.values(score)) is None:
        return None
    gaps = [ours[question] - theirs[question] for question in ours.keys() & theirs.keys()]
    if not gaps:
        return None
    mean, count = fmean(gaps), len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (count * (count - 1))) if count > 1 else None
    return Difference(mean, spread, count)


@dataclass(frozen=True)
class TasksResult:
    """checkpoints: in the order in which they were named. failures: name → why there are no scores of it."""

    lm_eval: str
    settings: Mapping[str, Any]
    base: Measured | None
    checkpoints: tuple[Measured, ...]
    failures: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        return {
            "lm_eval": self.lm_eval,
            "settings": dict(self.settings),
            "base": _plain(self.base, None) if self.base is not None else None,
            "checkpoints": {one.name: _plain(one, self.base) for one in self.checkpoints},
            "failures": dict(self.failures),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """HEADINGS of each metric and model; scores in % where all are shares."""
        models = [*([self.base] if self.base is not None else []), *self.checkpoints]
        rows: list[tuple[str, ...]] = []
        for key in dict.fromkeys(score.key for one in models for score in one.scores):
            scored = [(one, score) for one in models for score in one.scores if score.key == key]
            shares = all(abs(score.value) <= 1 for _, score in scored)
            for one, score in scored:
                gap = difference(self.base, one, score) if self.base is not None and one is not self.base else None
                shown_gap = _shown(gap.value, gap.stderr, shares, "+") if gap is not None else ""
                questions = str(score.num_docs) if score.num_docs is not None else ""
                rows.append((score.task, score.title, questions, one.name, _shown(score.value, score.stderr, shares), shown_gap))
        return rows

    def markdown(self) -> str:
        """The table, and under it what was asked how."""
        lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        lines += ["", self.note]
        lines += [f"\n{name}: {reason}" for name, reason in self.failures.items()]
        return "\n".join(lines) + "\n"

    @property
    def note(self) -> str:
        said = self.settings
        thinking = "with thinking" if said["thinking"] else "without thinking"
        fewshot = f", {said['num_fewshot']} examples" if said["num_fewshot"] is not None else ""
        limit = f", the first {said['limit']} questions of each task" if said["limit"] is not None else ""
        gap = "; Δ: difference on the same questions ± its standard error (paired)" if self.base is not None else ""
        return f"lm-eval {self.lm_eval} through the served endpoint, {thinking}{fewshot}{limit}. ± one standard error{gap}."


def _plain(one: Measured, base: Measured | None) -> dict[str, Any]:
    found = []
    for score in one.scores:
        gap = difference(base, one, score) if base is not None else None
        found.append(asdict(score) | ({"difference": asdict(gap) if gap is not None else None} if base is not None else {}))
    return {"served": one.served, "seconds": one.seconds, "scores": found}


def _shown(value: float, stderr: float | None, share: bool, sign: str = "") -> str:
    unit, form, suffix = (100.0, ".2f", " %") if share else (1.0, ".4g", "")
    return f"{unit * value:{sign}{form}}" + (f" ± {unit * stderr:{form}}" if stderr is not None else "") + suffix
