"""Numbers as a person would write them."""

from __future__ import annotations

import pytest

from llava_pdrop.report.units import MEMORY, Unit, column, digits, less, saved, text_of, time_text, time_unit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (26889, "26,900"),
        (26.889, "26.9"),
        (0.0026889, "0.00269"),
        (0, "0"),
        (-1.5, "-1.50"),
        (9.996, "10.0"),
        (999.7, "1,000"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (26.889, "26.9 s"),
        (0.0626, "62.6 ms"),
        (1.2e-5, "12.0 µs"),
        (95, "1.58 min"),
        (12_312, "3.42 h"),
        (0, "0 s"),
        (1e-9, "0.00100 µs"),
    ],
)
def test_a_time_has_the_unit_that_a_person_would_use(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


def test_figures_side_by_side_share_a_unit() -> None:
    unit = time_unit([26.9, 0.4])
    assert [unit.text(26.9), unit.text(0.4), unit.name] == ["26.9", "0.400", "s"]


def test_the_head_of_a_column_names_its_unit() -> None:
    assert column("step", [26.9, None, 0.4]) == ("step, s", ["26.9", "", "0.400"])
    assert column("cache", [3 * 2**20, 2**30], MEMORY) == ("cache, MiB", ["3.00", "1,020"])
    assert column("cache", [2**40, 0.0], MEMORY) == ("cache, GiB", ["1,020", "0"])
    assert column("peak", [None], MEMORY)[1] == [""]


def test_quartiles_stand_behind_their_median() -> None:
    ms = Unit("ms", 1e-3)
    assert ms.spread([0.01, 0.02, 0.04]) == "20.0 [10.0, 40.0]"
    assert (ms.spread([0.0] * 3), ms.spread([])) == ("-", "")


def test_no_value_is_no_text() -> None:
    assert digits(None) == ""
    assert (text_of(None, ".1%"), text_of(0.0, ".1%")) == ("", "0.0%")


def test_what_is_saved_is_a_share_of_what_it_took_before() -> None:
    assert saved(4.0, 3.0) == 0.25 and saved(2.0, 2.0) == 0 and saved(2.0, 3.0) == -0.5


def test_a_share_in_words_says_less_or_more() -> None:
    assert (less(0.123, "time"), less(-0.006)) == ("12.3% less time", "0.6% more")
