"""GQA: which texts are the same answer, as three projects compare them."""

from __future__ import annotations

import string

from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule, by_text, exact_match, grader, means
from llava_pdrop.eval.rules.text import from_sheet, same

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def prediction(answer: str) -> str:
    """As LLaVA hands it to GQA's own code: no full stops at the end, small letters; blanks stay."""
    return answer.rstrip(".").lower()


grade = by_text(prediction)


def words(text: str) -> str:
    """lmms-eval: but for case, outer blanks and punctuation."""
    return text.strip().lower().translate(NO_PUNCTUATION)


@grader
def grade_vlmevalkit(question: Question, answer: str) -> Grade:
    text = from_sheet(answer)
    return Grade(float(same(text, from_sheet(question.gold))), text)


ALSO = {
    "lmms_eval": Rule("lmms-eval lmms_eval/api/metrics.py exact_match", by_text(words, words), exact_match),
    "vlmevalkit": Rule("VLMEvalKit vlmeval/dataset/utils/vqa_eval.py (accuracy)", grade_vlmevalkit, means),
}
"""Other rules for the same answers."""
