"""AI2D: multiple choice about diagrams of a school book, with the labels of the question drawn in."""

from __future__ import annotations

import re
import string

from llava_pdrop.eval.benchmarks.base import Benchmark, Grade, Rule, grader, means
from llava_pdrop.eval.benchmarks.tables import (
    CHOICE_RULE,
    MOST_TOKENS,
    grade_choice,
    read_choices,
    total_choice,
    wanted,
)
from llava_pdrop.eval.questions import Question

LEADING_LETTER = re.compile(r"\s*([A-Z])\.")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@grader
def grade_lmms(question: Question, answer: str) -> Grade:
    """lmms-eval: the letter in front of a full stop, else the whole answer, but for case and punctuation."""
    found = LEADING_LETTER.match(answer)
    text = (found[1] if found else answer).strip().lower().translate(NO_PUNCTUATION)
    return Grade(float(text == question.gold.lower()), text)


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
    also={
        "lmms_eval": Rule(
            "lmms-eval lmms_eval/tasks/ai2d/utils.py",
            grade_lmms,
            lambda questions, grades: means(questions, grades, scale=1, overall="exact_match"),
        )
    },
)
