"""VQAv2: soft accuracy of all, by type of question and by type of answer, as three projects count it."""

from __future__ import annotations

from collections.abc import Sequence

from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, exact_match, grader, grouped, joined, means, values_of
from llava_pdrop.eval.rules.vqa import by_form, eval_ai, official, official_accuracy


@grader
def grade(question: Question, answer: str) -> Grade:
    """What the server makes of the file that LLaVA writes."""
    text = eval_ai(answer)
    return Grade(official_accuracy(text, question.facts["answers"])[0], text)


@grader
def grade_official(question: Question, answer: str) -> Grade:
    return Grade(*official_accuracy(answer, question.facts["answers"]))


def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Percent of all, by type of question and by type of answer."""
    values, parts = values_of(grades), [means(questions, grades, overall="overall")]
    for fact, name in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
        parts.append(grouped(values, [f"{name}/{question.facts[fact]}" for question in questions], 100))
    return joined(*parts)


ALSO = {
    "vqa_official": Rule("GT-Vision-Lab/VQA vqaEval.py", grade_official, total),
    "lmms_eval": Rule("lmms-eval lmms_eval/tasks/vqav2/utils.py", by_form(official), exact_match),
}
"""Other rules for the same answers."""
