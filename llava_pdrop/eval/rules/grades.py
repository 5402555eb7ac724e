"""What an answer is worth, and the numbers that are made of the worth of all.

Where only a server knows the right answers, its questions say so (``facts["known"]`` is False), and no rule is asked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps

import numpy as np

from llava_pdrop.eval.questions import Question

Statistic = Callable[[np.ndarray], dict[str, float]]
"""Weights (questions,) -> named numbers. Ones give the official ones; a draw of an interval counts some questions twice
and others not at all."""


@dataclass(frozen=True)
class Grade:
    """What an answer is worth, in [0, 1], and what the rule read in it (an option, a word, the normalised text).

    ``answered`` is False for an answer that was never given, which is wrong under every rule.
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
    """A rule for given answers as one for all: none that was never given is right."""

    @wraps(rule)
    def grade(question: Question, answer: str | None) -> Grade:
        return Grade(0.0, answered=False) if answer is None else rule(question, answer)

    return grade


def by_text(read: Callable[[str], str], value: Callable[[str, str], float] = operator.eq) -> Grader:
    """The rule that compares what is ``read`` in an answer with the right one: ``value`` of both, or whether they are
    the same."""
    return grader(lambda question, answer: Grade(float(value(text := read(answer), question.gold)), text))


def by_word(said: Callable[[str], str]) -> Grader:
    """The rule that what is ``said`` in an answer is the right one, in either case."""
    return by_text(said, lambda word, gold: word.lower() == gold.lower())


def values_of(grades: Sequence[Grade]) -> np.ndarray:
    """Values (questions,) float64."""
    return np.array([grade.value for grade in grades], dtype=np.float64)


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


def joined(*parts: Statistic) -> Statistic:
    """The numbers of all ``parts``."""
    return lambda weights: {name: value for part in parts for name, value in part(weights).items()}


def means(
    questions: Sequence[Question],
    grades: Sequence[Grade],
    by: Sequence[str] = (),
    scale: float = 100.0,
    overall: str = "Overall",
    only: np.ndarray | None = None,
) -> Statistic:
    """``overall``, the mean value times ``scale``, and that of every value of the facts ``by`` under its name.
    ``only``: a mask (questions,) of those that count."""
    rows = np.arange(len(questions)) if only is None else np.flatnonzero(only)
    values, asked = values_of(grades)[rows], [questions[row] for row in rows.tolist()]
    names = [[overall] * len(asked), *([str(question.facts[fact]) for question in asked] for fact in by)]
    parts = joined(*(grouped(values, own, scale) for own in names))
    return lambda weights: parts(weights[rows])


def exact_match(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """What lmms-eval calls the mean of all."""
    return means(questions, grades, scale=1, overall="exact_match")
