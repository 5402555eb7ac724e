"""What a benchmark is made of: files, questions, the value of an answer, and the numbers that are printed of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_pdrop.eval.questions import Question

Statistic = Callable[[np.ndarray], dict[str, float]]
"""Weights (questions,) -> named numbers. Ones give the official ones; a draw of an interval counts some questions twice
and others not at all."""


@dataclass(frozen=True)
class Wanted:
    """A file or directory that a benchmark reads.

    ``path``: below its own directory; ``source``: where it comes from; ``licence``: where one is known.
    """

    path: str
    source: str
    licence: str = ""


@dataclass(frozen=True)
class Grade:
    """What an answer is worth, in [0, 1], and what the rule read in it (an option, a word, the normalised text)."""

    value: float
    read: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A data set and the rule of its score.

    Attributes:
        name: its key in `BENCHMARKS`.
        title: what the paper calls its number; ``aliases``: what else.
        folder: its directory below ``eval.root``, as LLaVA names it.
        wanted: files and directories that `read` needs.
        rule: whose rule the score follows: project and file.
        split: the split that is scored; ``paper_split``: the one of the paper, where that is another. Their scores are
            then not compared.
        max_new_tokens: of an answer, at most, as where the prompt comes from.
        headline: the number of `total` that the paper prints, ``factor`` times; ``best``: the most it can be there.
        read: (directory, whether a LLaVA is asked) -> questions. Raises UserError: the files are not what is expected.
        grade: (question, answer) -> its value. ``None`` is an answer that was never given, "" an empty one.
        total: (questions, grades) -> the numbers of all.
        upload: writes what a server or judge takes: (questions, answers, grades, directory, name) -> its file. None:
            nothing is uploaded.
    """

    name: str
    title: str
    folder: str
    wanted: tuple[Wanted, ...]
    rule: str
    split: str
    read: Callable[[Path, bool], list[Question]]
    grade: Callable[[Question, str | None], Grade] | None
    total: Callable[[Sequence[Question], Sequence[Grade]], Statistic] | None
    headline: str
    factor: float = 1.0
    best: float = 100.0
    paper_split: str = ""
    aliases: tuple[str, ...] = ()
    max_new_tokens: int = 128
    upload: Callable[[Sequence[Question], Sequence[str | None], Path, str], Path] | None = None


def values_of(grades: Sequence[Grade]) -> np.ndarray:
    """Values (questions,) float64."""
    return np.array([grade.value for grade in grades], dtype=np.float64)


def mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean; 0 where nothing is drawn."""
    total = weights.sum()
    return float(values @ weights / total) if total else 0.0


def means(
    questions: Sequence[Question], grades: Sequence[Grade], by: str | None = None, scale: float = 100.0
) -> Statistic:
    """``Overall``, the mean value times ``scale``, and that of every value of the fact ``by`` under its name."""
    values = values_of(grades)
    names = [] if by is None else [str(question.facts[by]) for question in questions]
    groups = {name: np.array([own == name for own in names]) for name in dict.fromkeys(names)}

    def statistic(weights: np.ndarray) -> dict[str, float]:
        found = {"Overall": scale * mean(values, weights)}
        return found | {name: scale * mean(values[rows], weights[rows]) for name, rows in groups.items()}

    return statistic
