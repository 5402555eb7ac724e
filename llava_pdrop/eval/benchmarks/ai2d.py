"""AI2D: multiple choice about diagrams of a school book, with the labels of the question drawn in."""

from __future__ import annotations

import re
import string

from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.tables import MOST_TOKENS, read_choices, wanted
from llava_pdrop.eval.rules.choices import CHOICE_RULE, grade_choice, total_choice
from llava_pdrop.eval.rules.grades import Rule, by_word, exact_match

LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(answer: str) -> str:
    """lmms-eval: the letter in front of a full stop, else the whole answer, but for case and punctuation."""
    found = LEADING_LETTER.match(answer)
    return (found[1] if found else answer).strip().lower().translate(NO_PUNCTUATION)


AI2D = Benchmark(
    name="ai2d",
    title="AI2D",
    folder="ai2d",
    wanted=wanted(["AI2D_TEST"]),
    rule=CHOICE_RULE,
    split="test",
    read=lambda directory, llava: read_choices(directory, llava, ["AI2D_TEST"], ["category"]),
    grade=grade_choice,
    total=total_choice,
    headline="Overall",
    factor=100,
    max_new_tokens=MOST_TOKENS,
    also={"lmms_eval": Rule("lmms-eval lmms_eval/tasks/ai2d/utils.py", by_word(words), exact_match)},
)
