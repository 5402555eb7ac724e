"""How far a score can be trusted: 95 % intervals of it and of differences, by drawing the questions anew.

Percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over the *units* of a benchmark: single questions, or those
that are scored together. It works for every number of a benchmark, a mean as well as F1 or MME's sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

DRAWS = 1000
LEVEL = 0.95

Number = Callable[[np.ndarray], float]
"""Weights (questions,) -> a score."""


def draws_of(units: Sequence[str], number: Number) -> np.ndarray:
    """Scores (`DRAWS`,) of as many units drawn with replacement; the same units in every call, so that the differences
    between two columns are those of one set of questions.

    Args:
        units: name of the unit of every question.
    """
    names = {name: place for place, name in enumerate(dict.fromkeys(units))}
    unit_of = np.array([names[name] for name in units])
    random, found = np.random.default_rng(0), np.empty(DRAWS)
    for draw in range(DRAWS):
        times = np.bincount(random.integers(0, len(names), len(names)), minlength=len(names))
        found[draw] = number(times[unit_of].astype(np.float64))
    return found


def interval(found: np.ndarray, count: int, best: float) -> tuple[float, float]:
    """(low, high) in which 95 % of the draws ``found`` lie.

    Where all are alike because every answer is right, or wrong, nothing varies in what is drawn; the bound is then the
    exact one of ``count`` equal trials (Clopper and Pearson).

    Args:
        count: units drawn.
        best: the most a score can be; the least is 0.
    """
    low, high = (float(edge) for edge in np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    least = ((1 - LEVEL) / 2) ** (1 / count)
    if low == high == best:
        return best * least, best
    if low == high == 0:
        return 0.0, best * (1 - least)
    return low, high
