"""AI2D: multiple choice about diagrams of a school book, with the labels of the question drawn in."""

from __future__ import annotations

import re
import string

from llava_pdrop.eval.benchmarks.tables import choices
from llava_pdrop.eval.rules.grades import Rule, by_word, exact_match

LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(answer: str) -> str:
    """lmms-eval: the letter in front of a full stop, else the whole answer, but for case and punctuation."""
    found = LEADING_LETTER.match(answer)
    return (found[1] if found else answer).strip().lower().translate(NO_PUNCTUATION)


AI2D = choices(
    "ai2d",
    "AI2D",
    "AI2D_TEST",
    "test",
    {"lmms_eval": Rule("lmms-eval lmms_eval/tasks/ai2d/utils.py", by_word(words), exact_match)},
)
