"""What the answers to a benchmark are worth: its score, how sure that is, and what it stands beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_pdrop.eval.answering import Answer
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.evaluate import image_tokens_of
from llava_pdrop.eval.interval import draws_of, interval
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Rule, Statistic, known
from llava_pdrop.schedule import Schedule


@dataclass(frozen=True)
class Score:
    """One benchmark with one schedule.

    Attributes:
        value, low, high: as the paper prints it, and its 95 % interval; None where only a server knows the answers, or
            no question is one that it is about (`eval.limit`).
        paper: what the paper has; None where it is not about this: another split, schedule or number of questions.
        against: (first column of the benchmark, difference, low, high) on the same questions, drawn in pairs.
        unread: questions that could not be asked, with empty answers; ``problem`` of the first.
        seconds: per question; ``image_tokens`` per question, before any drop and after each one.
        numbers: all that its rule gives; ``also``: what other projects' rules give for the same answers, by project.
        prompt: of the first question.
        files: what was written.
    """

    benchmark: Benchmark
    column: str
    schedule: Schedule
    questions: int
    split: str
    value: float | None
    low: float | None
    high: float | None
    unread: int
    problem: str | None
    seconds: float
    image_tokens: list[float]
    numbers: dict[str, float]
    also: dict[str, dict[str, float]]
    prompt: str
    paper: float | None = None
    files: list[Path] = field(default_factory=list)
    against: tuple[str, float, float, float] | None = None
    draws: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)


def score_of(
    benchmark: Benchmark,
    questions: Sequence[Question],
    answers: Sequence[Answer],
    column: str,
    schedule: Schedule,
    prompt: str,
) -> Score:
    """What ``answers`` are worth."""
    found = statistics_of(benchmark, questions, [answer.text for answer in answers])
    numbers = {name: statistic(np.ones(len(questions))) for name, statistic in found.items()}
    own = numbers.pop(benchmark.rule, {})
    value = low = high = None
    draws = np.empty(0)
    if benchmark.headline in own:
        value = benchmark.factor * own[benchmark.headline]
        draws, (low, high) = interval_of(benchmark, questions, found[benchmark.rule])
    problems = [answer.problem for answer in answers if answer.problem is not None]
    asked = [answer.seconds for answer in answers if answer.problem is None]
    return Score(
        benchmark=benchmark,
        column=column,
        schedule=schedule,
        questions=len(questions),
        split=benchmark.split_of(questions),
        value=value,
        low=low,
        high=high,
        unread=len(problems),
        problem=problems[0] if problems else None,
        seconds=sum(asked) / max(len(asked), 1),
        image_tokens=image_tokens_of(answers, schedule),
        numbers=own,
        also=numbers,
        prompt=prompt,
        draws=draws,
    )


def statistics_of(
    benchmark: Benchmark, questions: Sequence[Question], texts: Sequence[str | None]
) -> dict[str, Statistic]:
    """Whose rule -> what it makes of the answers ``texts`` (None: never given); the benchmark's own rule comes first.
    Nothing where only a server, or a judge, can tell."""
    if benchmark.total is None or benchmark.grade is None or not known(questions):
        return {}
    own = Rule(benchmark.rule, benchmark.grade, benchmark.total)
    return {
        name: rule.total(questions, [rule.grade(question, text) for question, text in zip(questions, texts)])
        for name, rule in {benchmark.rule: own, **benchmark.also}.items()
    }


def interval_of(
    benchmark: Benchmark, questions: Sequence[Question], statistic: Statistic
) -> tuple[np.ndarray, tuple[float, float]]:
    """Draws (draws,) of the benchmark's number as the paper prints it, and its 95 % interval."""
    units = [unit_of(question) for question in questions]
    draws = draws_of(units, lambda weights: benchmark.factor * statistic(weights)[benchmark.headline])
    return draws, interval(draws, len(set(units)), benchmark.best)


def beside_paper(score: Score, limit: int | None, reported: Mapping[str, float]) -> Score:
    """The score with what the paper has, ``reported`` by title, if that is about the same questions:
    the same split, and no ``limit`` of them."""
    row = score.benchmark
    of_paper = limit is None and score.split == (row.paper_split or row.split)
    found = next((reported[name] for name in (row.title, *row.aliases) if name in reported), None)
    return replace(score, paper=found) if of_paper else score


def _against(first: Score, score: Score) -> Score:
    """Both are drawn with the same questions, so that their difference varies less than either."""
    if first.value is None or score.value is None:
        return score
    low, high = (float(edge) for edge in np.quantile(score.draws - first.draws, [0.025, 0.975]))
    return replace(score, against=(first.column, score.value - first.value, low, high))


def as_json(score: Score) -> dict[str, Any]:
    """The score for programs."""
    return {
        "benchmark": score.benchmark.name,
        "rule": score.benchmark.rule,
        "split": score.split,
        "column": score.column,
        "schedule": score.schedule.to_dict(),
        "questions": score.questions,
        "score": score.value,
        "interval": None if score.low is None else [score.low, score.high],
        "paper": score.paper,
        "against": None if score.against is None else list(score.against),
        "unread": score.unread,
        "problem": score.problem,
        "seconds_per_question": score.seconds,
        "image_tokens": score.image_tokens,
        "prompt": score.prompt,
        "numbers": score.numbers,
        "also": score.also,
    }


def paired(scores: Sequence[Score]) -> list[Score]:
    """Scores of one benchmark behind one another, all but the first with their difference from it."""
    first: dict[Benchmark, Score] = {}
    for score in scores:
        first.setdefault(score.benchmark, score)
    return [
        score if score is first[row] else _against(first[row], score)
        for row in first
        for score in scores
        if score.benchmark == row
    ]


def unit_of(question: Question) -> str:
    return question.unit or question.id
