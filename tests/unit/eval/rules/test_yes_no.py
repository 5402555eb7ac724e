"""Which of yes and no an answer says, in five ways."""

from __future__ import annotations

import pytest

from llava_pdrop.eval.rules.yes_no import four_letters, no_among_words, one_word, whole_answer, without_stops


@pytest.mark.parametrize(
    "answer", ["NO", "Not", "no!", "(No)", '"No"', "None", "no\n", "  ", "", ".No", "yes", "nope", "Is it. no"]
)
def test_all_but_three_words_are_yes_to_llava(answer) -> None:
    assert no_among_words(answer) == "yes"


@pytest.mark.parametrize("answer", ["No", "no", "no.", "Yes, but not close", "no, it is", "it is not. yes"])
def test_three_words_are_no_to_llava(answer) -> None:
    assert no_among_words(answer) == "no"


@pytest.mark.parametrize(
    ("answer", "word"),
    [("Yes", "yes"), ("yes.", "yes"), ("  no", "no"), ("   yes", "other"), ("None", "no"), ("Not really", "no"),
     ("nothing", "no"), ("Nope", "no"), ("The answer is yes.", "other"), ("Unknown", "other"), ("Yep", "other"),
     ("... no", "other"), (".. yes", "other"), ("", "other"), ("y", "other"), ("no yes", "no"), ("AYES", "yes")],
)  # fmt: skip
def test_eval_tool_looks_at_four_characters(answer, word) -> None:
    assert four_letters(answer) == word


@pytest.mark.parametrize(
    ("answer", "word"),
    [("   yes", "yes"), ("... no", "no"), ("y", "yes"), ("N.", "no"), ("Yep", "other"), ("", "other"), ("ye.s", "yes")],
)
def test_lmms_eval_strips(answer, word) -> None:
    assert without_stops(answer) == word


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("The answer is yes.", "Yes"),
        ("yes or no", "Unknown"),
        ("Not really", "Unknown"),
        ("(No)", "No"),
        ("", "Unknown"),
    ],
)
def test_vlmevalkit_looks_for_one_word(answer, word) -> None:
    assert one_word(answer) == word


def test_lmms_eval_wants_nothing_but_the_word() -> None:
    assert whole_answer(" Yes\n") == "yes"
    assert whole_answer("Yes.") == "yes."
