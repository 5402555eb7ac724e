"""DocVQA and InfoVQA: what stands in a document, or in a poster of figures. Scored by how near the letters come."""

from __future__ import annotations

from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.tables import short_answers
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule, grader, means
from llava_pdrop.eval.rules.text import alternatives, anls, from_sheet


@grader
def grade_lmms(question: Question, answer: str) -> Grade:
    """lmms-eval: the same similarity of the answer without its outer blanks, and no spreadsheet between."""
    text = answer.strip()
    return Grade(anls(text, alternatives(question.gold)), text)


LMMS = Rule(
    "lmms-eval lmms_eval/api/metrics.py anls",
    grade_lmms,
    lambda questions, grades: means(questions, grades, scale=1, overall="anls"),
)


def row(name: str, title: str, table: str) -> Benchmark:
    return short_answers(
        name,
        title,
        {table: "val"},
        "VLMEvalKit vlmeval/dataset/utils/vqa_eval.py (anls)",
        lambda answer, gold: anls(from_sheet(answer), alternatives(from_sheet(gold))),
        read_as=from_sheet,
        also={"lmms_eval": LMMS},
    )


DOCVQA = row("docvqa", "DocVQA", "DocVQA_VAL")
INFOVQA = row("infovqa", "InfoVQA", "InfoVQA_VAL")
