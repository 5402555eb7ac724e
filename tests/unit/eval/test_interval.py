"""Intervals of scores and of paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from llava_pdrop.eval.interval import draws_of, interval


def means(values):
    values = np.asarray(values, dtype=float)
    return lambda weights: float(values @ weights / weights.sum())


def test_a_mean_has_the_interval_of_its_standard_error():
    random = np.random.default_rng(1)
    values = random.random(400) < 0.7
    found = draws_of([str(i) for i in range(400)], means(values))
    low, high = interval(found, 400, 1.0)
    wanted = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert high - low == pytest.approx(2 * wanted, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.01)


def test_questions_of_one_unit_are_drawn_together():
    """Two hundred units of ten equal questions say as much as two hundred questions, not as two thousand."""
    values = np.repeat(np.arange(200) % 2, 10)
    units = np.repeat(np.arange(200), 10)
    together = interval(draws_of(list(map(str, units)), means(values)), 200, 1.0)
    alone = interval(draws_of(list(map(str, range(2000))), means(values)), 2000, 1.0)
    assert together[1] - together[0] == pytest.approx((alone[1] - alone[0]) * np.sqrt(10), rel=0.15)


def test_two_columns_are_drawn_with_the_same_questions():
    values = np.random.default_rng(2).random(50)
    one, other = (draws_of([str(i) for i in range(50)], means(column)) for column in (values, values - 0.25))
    assert np.allclose(one - other, 0.25)


def test_all_right_and_all_wrong_are_no_points():
    right = draws_of([str(i) for i in range(100)], means(np.ones(100)))
    assert interval(100 * right, 100, 100.0) == (pytest.approx(100 * 0.025 ** (1 / 100)), 100.0)
    assert interval(0 * right, 100, 100.0) == (0.0, pytest.approx(100 * (1 - 0.025 ** (1 / 100))))
