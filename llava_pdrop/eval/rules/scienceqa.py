"""ScienceQA: which letter an answer is, and the numbers of all questions and of those with a picture."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

import numpy as np

from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.choices import CHOICE_RULE, grade_choice
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, Total, by_text, by_word, joined, means

LETTERS = "ABCDE"
ANSWER_IS = re.compile("The answer is ([A-Z]).")
FAILED = "FAILED"


def parsed(answer: str) -> str:
    """The letter that LLaVA reads: alone, in front of a full stop and a blank, or behind the one "The answer is"."""
    if answer and answer in LETTERS and len(answer) == 1:
        return answer
    if answer[:1] and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    found = ANSWER_IS.findall(answer)
    return found[0] if len(found) == 1 else FAILED


grade = by_text(parsed)


def letter_of(answer: str) -> str:
    """lmms-eval: the letter, or a capital in front of a full stop."""
    text = answer.strip()
    return text[0] if len(text) >= 2 and text[0] in string.ascii_uppercase and text[1] == "." else text


def pictured(questions: Sequence[Question], grades: Sequence[Grade]) -> np.ndarray:
    """Mask of the questions with a picture. One that was never answered is not among them: the official code looks for
    the picture in the answer file."""
    return np.array([question.facts["image"] and grade.answered for question, grade in zip(questions, grades)])


def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Share of right answers of all, and of those with a picture."""
    of_pictures = means(questions, grades, overall="img_accuracy", only=pictured(questions, grades))
    return joined(means(questions, grades, overall="accuracy"), of_pictures)


def total_of_pictures(name: str, by: Sequence[str] = ()) -> Total:
    return lambda questions, grades: means(questions, grades, by, 1, name, pictured(questions, grades))


ALSO = {
    "lmms_eval": Rule(
        "lmms-eval lmms_eval/tasks/scienceqa/utils.py", by_word(letter_of), total_of_pictures("exact_match")
    ),
    "vlmevalkit": Rule(CHOICE_RULE, grade_choice, total_of_pictures("Overall", ["category"])),
}
"""Other rules for the same answers."""
