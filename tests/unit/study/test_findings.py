"""Paired differences, ties, and the depth at which a ranking stops being better than chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llava_pdrop.eval.answering import Answer
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.questions import ask
from llava_pdrop.eval.rules.grades import Grade, means
from llava_pdrop.eval.score import Score, score_of
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.findings import Difference, Findings, horizon
from llava_pdrop.study.grid import Grid

COUNT = 400
QUESTIONS = [ask(str(i), "Is it?", [], f"q[{i}]", "yes") for i in range(COUNT)]
TOY = Benchmark(
    name="toy",
    title="Toy",
    wanted=(),
    rule="none",
    split="",
    read=lambda directory, llava: list(QUESTIONS),
    grade=lambda question, answer: Grade(float(answer == question.gold)),
    total=means,
    headline="Overall",
)


def scored(right: Any) -> Score:
    """The score of answers of which those are ``right`` (questions,)."""
    answers = [Answer(q.id, "yes" if hit else "no", (8,)) for q, hit in zip(QUESTIONS, right)]
    return score_of(TOY, QUESTIONS, answers, "c", Schedule(), "p")


def rates(random: np.random.Generator, rate: float) -> Any:
    return random.random(COUNT) < rate


def test_the_error_is_that_of_paired_differences() -> None:
    """As the textbook has it: the standard deviation of the differences by the root of their number."""
    random = np.random.default_rng(0)
    one, other = rates(random, 0.7), rates(random, 0.6)
    found = Difference.of((scored(one), scored(other)))
    differences = 100 * (one.astype(float) - other)
    assert found.value == pytest.approx(differences.mean())
    assert found.error == pytest.approx(differences.std(ddof=1) / COUNT**0.5, rel=0.1)


def test_what_is_alike_in_both_does_not_count() -> None:
    """Unpaired, a difference of one point would drown."""
    base = np.arange(COUNT) % 2 == 0
    better = base | (np.arange(COUNT) % 20 == 1)
    found = Difference.of((scored(better), scored(base)))
    assert found.value == pytest.approx(5) and found.error < 1.5 and found.verdict == "better"
    assert Difference.of((scored(base), scored(better))).verdict == "worse"
    assert Difference.of((scored(base), scored(base))) == Difference(0.0, 0.0)


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [(0.0, 0.0, "tie"), (2.0, 1.0, "tie"), (2.1, 1.0, "better"), (-2.1, 1.0, "worse"), (1.0, 0.0, "better")],
)
def test_two_standard_errors_are_a_tie(value: float, error: float, verdict: str) -> None:
    assert Difference(value, error).verdict == verdict


@pytest.mark.parametrize(
    ("gains", "start"),
    [((9, 9, 9), None), ((9, 9, 1), 3), ((9, 0, -9), 2), ((1, 1, 1), 1), ((0, 9, 0), 3), ((), None)],
)
def test_the_horizon_is_where_the_last_gain_ends(gains: tuple[float, ...], start: int | None) -> None:
    assert horizon({layer: Difference(gain, 1.0) for layer, gain in enumerate(gains, 1)}) == start


def test_a_grid_is_read_by_layer_and_share() -> None:
    """The ranking is right where random choice is in half of the cases, at layer 1 only."""
    grid, random = Grid.of(3, [1, 2], [0.5, 0.0]), np.random.default_rng(1)
    all_right, half = scored(np.ones(COUNT, dtype=bool)), scored(rates(random, 0.5))
    scores = {cell: half if cell.ranker == "random" and cell.layer == 1 else all_right for cell in grid.cells}
    scores[grid.cell(1, 0.0, "random")] = scored(np.zeros(COUNT, dtype=bool))
    found = Findings(grid, all_right, scores)
    assert set(found.against) == {(1, 0.5), (2, 0.5)}, "where nothing stays nobody chooses"
    assert found.by_layer[1].value == pytest.approx(50, abs=6) and found.by_layer[1].verdict == "better"
    assert horizon(found.by_layer) == 2
    assert found.losses[grid.cell(1, 0.0, "random")].value == pytest.approx(100)
    assert not Findings(Grid.of(3, [1], [0.0]), all_right, scores).by_layer
