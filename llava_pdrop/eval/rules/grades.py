"""What an answer is worth, and the numbers that are made of the worth of all.

Where only a server knows the right answers, its questions say so (``facts["known"]`` is False). The value of every
answer is NaN then, and `Statistic` is empty: there is no score to print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps

import numpy as np

from llava_pdrop.eval.questions import Question

Statistic = Callable[[np.ndarray], dict[str, float]]
"""Weights (questions,) -> named numbers. Ones give the official ones; a draw of an interval counts some questions twice
and others not at all. Empty where the right answers are not known."""


@dataclass(frozen=True)
class Grade:
    """What an answer is worth, in [0, 1], and what the rule read in it (an option, a word, the normalised text).

    ``value`` is NaN where the right answer is not known; ``answered`` is False for an answer that was never given,
    which is wrong under every rule.
    """

    value: float
    read: str = ""
    answered: bool = True


Grader = Callable[[Question, str | None], Grade]
Total = Callable[[Sequence[Question], Sequence[Grade]], Statistic]


@dataclass(frozen=True)
class Rule:
    """Another project's rule for the same answers: its project and file, and the two functions of `Benchmark`."""

    rule: str
    grade: Grader
    total: Total


def known(questions: Sequence[Question]) -> bool:
    """Whether the right answers are here; else only a server has them."""
    return all(question.facts.get("known", True) for question in questions)


def grader(rule: Callable[[Question, str], Grade]) -> Grader:
    """A rule for given answers as one for all: none that was never given is right, and none is judged where the right
    answer is not known."""

    @wraps(rule)
    def grade(question: Question, answer: str | None) -> Grade:
        if not question.facts.get("known", True):
            return Grade(float("nan"), answered=answer is not None)
        return Grade(0.0, answered=False) if answer is None else rule(question, answer)

    return grade


def by_word(said: Callable[[str], str]) -> Grader:
    """The rule that what is ``said`` in an answer is the right one, in either case."""

    @grader
    def grade(question: Question, answer: str) -> Grade:
        word = said(answer)
        return Grade(float(word.lower() == question.gold.lower()), word)

    return grade


def values_of(grades: Sequence[Grade]) -> np.ndarray:
    """Values (questions,) float64."""
    return np.array([grade.value for grade in grades], dtype=np.float64)


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean; 0 where nothing is drawn."""
    total = weights.sum()
    return float(values @ weights / total) if total else 0.0


def grouped(values: np.ndarray, names: Sequence[str], scale: float = 1.0) -> Statistic:
    """Mean of ``values`` (rows,) times ``scale`` in every group of ``names``, in their order; 0 where none is drawn.

    Weights are counted once for all groups, so that a thousand draws of 200,000 questions stay a matter of seconds.
    """
    codes_of = {name: code for code, name in enumerate(dict.fromkeys(names))}
    codes = np.array([codes_of[name] for name in names], dtype=np.intp)

    def statistic(weights: np.ndarray) -> dict[str, float]:
        counts = np.bincount(codes, weights, len(codes_of))
        sums = np.bincount(codes, weights * values, len(codes_of))
        found = scale * sums / np.where(counts > 0, counts, 1.0)
        return dict(zip(codes_of, found.tolist()))

    return statistic


def means(
    questions: Sequence[Question],
    grades: Sequence[Grade],
    by: str | Sequence[str] = (),
    scale: float = 100.0,
    overall: str = "Overall",
    only: np.ndarray | None = None,
    prefix: str = "",
) -> Statistic:
    """``overall``, the mean value times ``scale``, and that of every value of the facts ``by`` under its name.

    ``only``: a mask (questions,) of those that count; ``prefix`` stands in front of every name. Empty where the right
    answers are not known.
    """
    values = values_of(grades)
    if np.isnan(values).any():
        return lambda weights: {}
    rows = np.arange(len(questions)) if only is None else np.flatnonzero(only)
    kept = values[rows]
    parts = [grouped(kept, [f"{prefix}{overall}"] * len(rows), scale)]
    for fact in [by] if isinstance(by, str) else by:
        parts.append(grouped(kept, [f"{prefix}{questions[row].facts[fact]}" for row in rows.tolist()], scale))

    def statistic(weights: np.ndarray) -> dict[str, float]:
        own = weights[rows]
        return {name: value for part in parts for name, value in part(own).items()}

    return statistic


def exact_match(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """What lmms-eval calls the mean of all."""
    return means(questions, grades, scale=1, overall="exact_match")
