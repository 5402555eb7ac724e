"""Which option an answer chooses."""

from __future__ import annotations

import pytest

from llava_pdrop.eval.rules.choices import chosen, options_of

FRUIT = {"A": "apple", "B": "pineapple", "C": "pear", "D": "fig"}
LONG = {"A": "a rowing boat at the shore", "B": "a typewriter over the door", "C": "a kettle by the stove"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"), (" C\n", "C"), ("(B)", "B"), ("[D]", "D"), ("B.", "B"), ("B: pear", "B"), ("**A**", "A"),
        ("#C#", "C"), ("{D}", "D"), ("A cat", "A"), ("The correct option is C: pear", "C"),
        ("b", "Z"), ('"B"', "Z"), ("B。", "Z"), ("B\uff1a", "Z"), ("\uff22", "Z"), ("A B", "Z"),
        ("A/B", "Z"), ("AA", "Z"),
        ("E", "Z"), ("Z", "Z"), ("", "Z"), ("It is Z", "Z"),
        ("Cannot determine the answer", "Z"), ("Cannot determine the answer: B", "Z"),
        ("A thing is shown here", "Z"),  # the letter is not among the last four words
        ("A is shown right here", "Z"), ("A is shown here", "A"),
        ("A x x x x A", "Z"),  # the first place counts
        ("The answer is cat.", "C"), ("answer is a pear", "A"), ("answer is blue", "B"), ("THE ANSWER IS B", "B"),
        ("answer  is\n**d**", "D"), ("The answer is E, or answer is B", "B"), ("The answer: pear", "C"),
        ("The answer is fig", "D"), ("The answer is eggs", "Z"),
        ("pear", "C"), ("PEAR!", "C"), ("pineapple", "Z"), ("apple", "A"), ("pear or fig", "Z"),
        ("a pear that lies behind the curtain, I think it is there", "Z"),  # twice as long as all options
        ("None", "Z"), ("nan", "Z"),
    ],
)  # fmt: skip
def test_chosen(answer: str, letter: str) -> None:
    assert chosen(answer, FRUIT) == letter


def test_two_letters_leave_what_follows_answer_is() -> None:
    assert chosen("A or B: the answer is A", LONG) == "A"
    assert chosen("The answer is D. a kettle by the stove", LONG) == "C"  # no option D


def test_failed_calls_go_by_text() -> None:
    assert chosen("Failed to obtain answer via API B", LONG) == "Z"
    assert chosen("Failed to obtain answer via API: a kettle by the stove", LONG) == "C"


def test_missing_answers_match_an_option_that_says_so() -> None:
    assert chosen("", {"A": "banana", "B": "nan"}) == "B"
    assert chosen("N/A", {"A": "x", "B": "y"}) == "Z"


def test_letters_as_options() -> None:
    letters = {"A": "E", "B": "A", "C": "F", "D": "B"}
    assert chosen("E", letters) == "A"
    assert chosen("e", letters) == "A"
    assert chosen("F.", letters) == "C"
    assert chosen("A", letters) == "A"


def test_options_skip_what_is_missing() -> None:
    assert options_of({"index": "1", "A": "x", "C": "y", "answer": "A"}) == {"A": "x", "C": "y"}
