"""Short answers as VLMEvalKit judges them."""

from __future__ import annotations

import pytest

from llava_pdrop.eval.rules.text import alternatives, anls, from_sheet, relaxed, same


@pytest.mark.parametrize("text", ["", "None", "N/A", "n/a", "NA", "null", "NULL", "NaN", "nan", None])
def test_a_spreadsheet_loses_what_it_takes_for_missing(text) -> None:
    assert from_sheet(text) == "nan"


@pytest.mark.parametrize("text", ["none", "NONE", " None", "None.", "  ", "n/a because", "Nan", "0"])
def test_a_spreadsheet_keeps_the_rest(text) -> None:
    assert from_sheet(text) == text


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("['a', \"b's\"]", ["a", "b's"]),
        ("[2009, 2012]", ["2009", "2012"]),
        ("[1.50]", ["1.5"]),
        ("[2009, 2012", ["[2009, 2012"]),
        ("(1, 2)", ["(1, 2)"]),
        ("2009", ["2009"]),
        ("[a, b]", ["[a, b]"]),
        ("\x00", ["\x00"]),
        ("[" * 500, ["[" * 500]),
    ],
)
def test_a_cell_may_hold_several_answers(cell, answers) -> None:
    assert alternatives(cell) == answers


@pytest.mark.parametrize("cell", ["1or 2", "[1or 2]", "5 is", "[0x1for x in y]"])
def test_a_cell_that_looks_like_code_is_no_warning(cell, recwarn) -> None:
    assert alternatives(cell) == [cell]
    assert [*recwarn] == []


@pytest.mark.parametrize(
    ("answer", "golds", "value"),
    [
        ("abcd", ["abxx"], 0.5),  # exactly half counts
        ("abcd", ["axxx"], 0.0),
        ("abcdefg", ["abcxxxx"], 0.0),
        (" ABC  d ", ["abc d"], 1.0),
        ("  xbcd  ", ["abcd"], 1 - 1 / 8),  # outer blanks lengthen what is divided by
        ("xbcd", ["abcd"], 1 - 1 / 4),
        ("nan", ["na"], 1 - 1 / 3),
        ("b", ["aaaa", "b"], 1.0),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("Strase", ["Straße"], 1 - 1 / 7),  # counted in capitals: STRASSE
    ],
)
def test_anls(answer, golds, value) -> None:
    assert anls(answer, golds) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("14%", "0.14"), ("2015", "2010"), ("5%%", "0.05"), ("1_204", "1204"), ("\uff11\uff12", "12"), ("1e2", "100"),
        ("+100", "100"), (".57", "0.57"), ("5.", "5"), (" 5 ", "5"), ("105", "100"), ("95", "100"), ("0", "0"),
        ("0%", "0%"), ("YES", "yes"), ("-0", "-0"),
    ],
)  # fmt: skip
def test_relaxed_is_right(answer, gold) -> None:
    assert relaxed(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("14", "14%"), ("0.0", "0"), ("0", "0.0"), ("0%", "0"), ("-0", "0"), ("1,204", "1204"), ("$5", "5"),
        ("5 units", "5"), ("\u22123.2", "-3.2"), ("nan", "nan"), ("inf", "inf"), ("105.1", "100"), ("94.9", "100"),
        ("5% ", "5%"), ("Yes.", "yes"), ("-5", "5"), ("", "5"),
    ],
)  # fmt: skip
def test_relaxed_is_wrong(answer, gold) -> None:
    assert not relaxed(answer, gold)


def test_same() -> None:
    assert same(" Yes\n", "yes")
    assert not same("yes.", "yes")
    assert not same("none", from_sheet("None"))
