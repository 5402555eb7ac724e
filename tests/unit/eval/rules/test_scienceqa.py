"""ScienceQA: how a letter must stand."""

from __future__ import annotations

import pytest

from llava_pdrop.eval.rules.scienceqa import parsed


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("B. ", "B"), ("B. cat", "B"), ("B.", "FAILED"), ("b", "FAILED"), (" B", "FAILED"), ("F", "FAILED"),
     ("F. cat", "FAILED"), ("AB", "FAILED"), ("", "FAILED"), ("The answer is B.", "B"), ("The answer is Bx", "B"),
     ("The answer is B", "FAILED"), ("The answer is B\n", "FAILED"), ("The answer is Q.", "Q"),
     ("The answer is B. The answer is B.", "FAILED"), ("the answer is B.", "FAILED"), ("A. The answer is B.", "A")],
)  # fmt: skip
def test_the_letter_that_llava_reads(answer, letter) -> None:
    assert parsed(answer) == letter
