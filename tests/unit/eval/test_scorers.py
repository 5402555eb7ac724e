"""What counts as right."""

from __future__ import annotations

import pytest

from llava_pdrop.eval.scorers import SCORERS, normalise


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The Cat. ", "the cat"),
        ("A  big\n dog!", "a big dog!"),
        ("it's", "it's"),
        ("", ""),
        ("3.5..", "3.5"),
        ("-7", "-7"),
    ],
)
def test_normalise(text, plain):
    assert normalise(text) == plain


@pytest.mark.parametrize(
    ("scorer", "answer", "gold", "score"),
    [
        ("exact_match", "Yes.", "yes", 1),
        ("exact_match", "yes, it is", "yes", 0),
        ("exact_match", "", "7", 0),
        ("exact_match", "", "A", 0),
        ("exact_match", "a", "A", 1),
        ("exact_match", "the", "An", 0),
        ("exact_match", "71", "7", 0),
        ("exact_match", "15", "1.5", 0),
        ("exact_match", "5", "-5", 0),
        ("exact_match", "330", "3:30", 0),
        ("exact_match", "50", "50%", 0),
        ("first_word", "yes, it is", "yes", 1),
        ("first_word", "A. krill", "A", 1),
        ("first_word", "(B) krill", "B", 1),
        ("first_word", "1.5 m", "15", 0),
        ("first_word", "-5", "5", 0),
        ("first_word", "", "yes", 0),
        ("first_word", "", "A", 0),
        ("contains", "It is a red circle.", "red", 1),
        ("contains", "It is a reddish circle.", "red", 0),
        ("contains", "It is A.", "A", 1),
        ("contains", "", "A", 0),
        ("contains", "15 m", "1.5", 0),
        ("contains", "It is -5.", "5", 0),
        ("contains", "It is 5.", "5", 1),
        ("contains", "at 3:30", "30", 0),
        ("contains", "at 3:30.", "3:30", 1),
        ("contains", "1.5", "5", 0),
        ("contains", "1.5", "1", 0),
        ("number", "about 1,234 people", "1234", 1),
        ("number", "3.0", "3", 1),
        ("number", "none", "3", 0),
        ("number", ".5", "0.5", 1),
        ("number", "-.5", "-0.5", 1),
        ("number", "5", "-5", 0),
        ("number", "330", "3:30", 0),
        ("number", "15", "1.5", 0),
        ("number", "", "0", 0),
    ],
)
def test_scorers(scorer, answer, gold, score):
    assert SCORERS[scorer](answer, gold) == score
