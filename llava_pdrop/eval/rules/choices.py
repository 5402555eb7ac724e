"""Which option an answer chooses, as VLMEvalKit reads it without a judge (``vlmeval/utils/matching_util.py``).

First a letter among the words, then what follows "answer is", then the text of an option.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Statistic, grader, means
from llava_pdrop.eval.rules.text import from_sheet

CHOICE_RULE = "VLMEvalKit vlmeval/utils/matching_util.py, without a judge"

UNREAD = "Z"
"""What stands for an answer that chooses no option, or that says so."""

NEAR_THE_END = 4
"""Words at the end of an answer among which its letter must be."""

BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"


def options_of(row: Mapping[str, str]) -> dict[str, str]:
    """The options of a row of a table: columns ``A`` to ``Z`` that have a text."""
    return {letter: row[letter] for letter in string.ascii_uppercase if letter in row}


def chosen(answer: str, options: Mapping[str, str]) -> str:
    """Letter of the option that is chosen, or `UNREAD`. The answer passes a spreadsheet first, as it does there."""
    text = from_sheet(answer)
    return _by_letter(text, options) or _by_text(text.lower(), options) or UNREAD


def _by_letter(answer: str, options: Mapping[str, str]) -> str:
    """The one option letter that is a word of its own, near the end; else the character behind "answer is", which need
    not be a word (``The answer is cat.`` is C)."""
    if FAILED in answer:
        return ""
    if any(phrase in answer for phrase in REFUSALS):
        return UNREAD
    words = answer.translate(BLANKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - NEAR_THE_END:
        return letters[0]
    if not letters and UNREAD in words:
        return UNREAD
    found = ANSWER_IS.search(answer)
    return found[1].upper() if found and found[1].upper() in options else ""


def _by_text(answer: str, options: Mapping[str, str]) -> str:
    """The one option whose text is part of the answer; an answer twice as long as all options says more than that."""
    if len(answer) > 2 * sum(map(len, options.values())):
        return ""
    letters = [letter for letter, text in options.items() if text.lower() in answer]
    return letters[0] if len(letters) == 1 else ""


@grader
def grade_choice(question: Question, answer: str) -> Grade:
    """VLMEvalKit without a judge: the option that is read, or none."""
    letter = chosen(answer, question.facts["options"])
    return Grade(float(letter == question.gold), letter)


def total_choice(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Share of right answers, of all and by category."""
    return means(questions, grades, ["category"], scale=1)
