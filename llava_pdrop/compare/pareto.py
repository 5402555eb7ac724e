"""What an ablation found, row by row: the mean over seeds, simple baselines, and the Pareto front: rows than which no
other has a higher score in less time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from llava_pdrop.compare.budgets import Budget
from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.compare.variants import Variant
from llava_pdrop.cost.plan import make_plan
from llava_pdrop.report.units import mean_and_error
from llava_pdrop.schedule import Schedule

BASELINES = ("random", "uniform")
"""Rankers that look at nothing. Pooling without drops is a baseline too."""

TRAINING, ANSWER = "training", "answer"
"""The two times of a front."""


@dataclass(frozen=True)
class Shown:
    """A row of the tables.

    Attributes:
        row: the mean of its runs.
        budgets: in whose tables it stands.
        score: (mean, standard error) of `score_of`; None where nothing was asked.
        times: the same of what `TRAINING` and `ANSWER` take, as far as they were measured: see `training_time`, and
            seconds of an answer.
        relative: the time of the training is a share of vanilla's, not seconds.
        fronts: those of the two on whose Pareto front it lies.
    """

    row: VariantRow
    budgets: tuple[Budget, ...]
    score: tuple[float, float] | None
    times: dict[str, tuple[float, float]]
    relative: bool = False
    fronts: tuple[str, ...] = ()

    @property
    def baseline(self) -> bool:
        """Whether its tokens are chosen without looking at anything."""
        return is_baseline(self.row.schedule)

    @property
    def training_free(self) -> bool:
        """Whether it is another row's model."""
        return " + " in self.row.name

    def facts(self) -> dict[str, Any]:
        """For programs; scores between 0 and 1 where they are accuracies. Of one run no error is known."""

        def estimate(found: tuple[float, float] | None) -> dict[str, float | None] | None:
            error = found[1] if found is not None and len(self.row.runs) > 1 else None
            return None if found is None else {"mean": found[0], "standard_error": error}

        return {
            "name": self.row.name,
            "runs": [run.name for run in self.row.runs],
            "seeds": [run.config.seed for run in self.row.runs],
            "budgets": [budget.tokens for budget in self.budgets],
            "baseline": self.baseline,
            "training_free": self.training_free,
            "score": estimate(self.score),
            "training_share" if self.relative else "training_seconds": estimate(self.times.get(TRAINING)),
            "answer_seconds": estimate(self.times.get(ANSWER)),
            "pareto_front": list(self.fronts),
        }


def is_baseline(schedule: Schedule) -> bool:
    """Whether ``schedule`` drops or pools without looking at what it keeps."""
    return not schedule.vanilla and all(ranker in BASELINES for ranker in schedule.rankers)


def score_of(row: VariantRow) -> float | None:
    """What rows are compared by: accuracy on ``data.eval``; without it the first benchmark's score."""
    own = (score.value for score in row.scores if score.column == row.name)
    return next(own, None) if row.accuracy is None else row.accuracy


def shown_rows(variants: Sequence[Variant], measured: Sequence[VariantRow]) -> list[Shown]:
    """Runs that differ in their seed only as one row; vanilla ones first, then the best first, ties as they came.

    Args:
        measured: of every variant, then those of schedules tried on their models, ``MODEL + ROW``.
    """
    of = {variant.name: variant for variant in variants}
    budgets = {variant.row: variant.budgets for variant in variants}
    groups: dict[str, list[VariantRow]] = {}
    for row in measured:
        model, plus, schedule = row.name.partition(" + ")
        name = f"{of[model].row}{plus}{schedule}"
        budgets.setdefault(name, budgets.get(schedule, (Budget(),)))
        groups.setdefault(name, []).append(row if row.plan else replace(row, plan=make_plan(row.config, ())))
    models = {row.name: row for row in measured}
    trained = [row for row in measured if row.timing]
    relative = any(row.schedule.vanilla for row in trained) and all(
        row.schedule.vanilla or row.realised is not None for row in trained
    )
    shown = []
    for name, runs in groups.items():
        training = mean_and_error([training_time(models[run.name.partition(" + ")[0]], relative) for run in runs])
        answer = mean_and_error([run.answer_seconds for run in runs])
        times = {key: found for key, found in ((TRAINING, training), (ANSWER, answer)) if found is not None}
        score = mean_and_error([score_of(run) for run in runs])
        shown.append(Shown(mean_row(name, runs), budgets[name], score, times, relative))
    shown.sort(key=lambda each: (not each.row.schedule.vanilla, -each.score[0] if each.score else 0.0))
    fronts = {key: front([_place(each, key) for each in shown]) for key in (TRAINING, ANSWER)}
    return [
        replace(each, fronts=tuple(key for key, on in fronts.items() if on[place])) for place, each in enumerate(shown)
    ]


def mean_row(name: str, runs: Sequence[VariantRow]) -> VariantRow:
    """The row ``name`` of several runs; what is no number is that of the first."""
    first = runs[0]
    if len(runs) == 1 and first.name == name:
        return first

    def mean(values: Iterable[float | None]) -> float | None:
        found = mean_and_error(values)
        return None if found is None else found[0]

    accuracy, realised = mean(run.accuracy for run in runs), mean(run.realised for run in runs)
    timed = [run.timing for run in runs if run.timing]
    return replace(
        first,
        name=name,
        over=tuple(runs),
        evaluation={**first.evaluation, "accuracy": accuracy} if first.evaluation else None,
        saving=replace(first.saving, realised=realised) if first.saving and realised is not None else None,
        answer_seconds=mean(run.answer_seconds for run in runs),
        predicted=mean(run.predicted for run in runs),
        timing=replace(timed[0], wall=fmean(t.wall for t in timed), cpu=fmean(t.cpu for t in timed)) if timed else None,
    )


def front(places: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Which of the (seconds, score) are on the Pareto front: no other has at least that score in at most that time, and
    one of the two better. A place that is None is not."""

    def beaten(place: tuple[float, float]) -> bool:
        return any(
            other is not None and other[0] <= place[0] and other[1] >= place[1] and other != place for other in places
        )

    return [place is not None and not beaten(place) for place in places]


def marks(shown: Sequence[Shown]) -> list[tuple[str, list[str]]]:
    """Columns of the table: simple baselines, and the fronts."""
    return [
        ("baseline", ["yes" if each.baseline else "" for each in shown]),
        ("Pareto front", [", ".join(each.fronts) for each in shown]),
    ]


def _place(each: Shown, key: str) -> tuple[float, float] | None:
    return (each.times[key][0], each.score[0]) if each.score and key in each.times else None


def training_time(row: VariantRow, relative: bool) -> float | None:
    """What a whole training took, without stage 1: a share of the time without drops, by turns where they were taken
    (runs that were trained one after the other also compare what else the machine did), or else seconds: the median
    step times the steps. None for what was not trained."""
    if row.timing is None:
        return None
    if relative:
        return 1.0 if row.realised is None else 1 - row.realised
    return row.timing.seconds * row.timing.steps
