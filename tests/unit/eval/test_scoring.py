"""What counts as right."""

from __future__ import annotations

import pytest

from llava_pdrop.eval.scoring import SCORERS, normalise


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The Cat. ", "cat"),
        ("A  big\n dog!", "big dog"),
        ("it's", "its"),
        ("", ""),
        ("Theatre", "theatre"),
        ("7", "7"),
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
        ("exact_match", "71", "7", 0),
        ("first_word", "yes, it is", "yes", 1),
        ("first_word", "", "yes", 0),
        ("contains", "It is a red circle.", "red", 1),
        ("contains", "It is a reddish circle.", "red", 0),
        ("number", "about 1,234 people", "1234", 1),
        ("number", "3.0", "3", 1),
        ("number", "none", "3", 0),
    ],
)
def test_scorers(scorer, answer, gold, score):
    assert SCORERS[scorer](answer, gold) == score
