"""DocVQA and InfoVQA: what stands in a document, or in a poster of figures. Scored by how near the letters come."""

from __future__ import annotations

from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.tables import short_answers
from llava_pdrop.eval.rules.grades import Rule, by_text, means
from llava_pdrop.eval.rules.text import alternatives, anls, from_sheet

LMMS = Rule(
    "lmms-eval lmms_eval/api/metrics.py anls",
    by_text(str.strip, lambda text, gold: anls(text, alternatives(gold))),
    lambda questions, grades: means(questions, grades, scale=1, overall="anls"),
)
"""The same similarity of the answer without its outer blanks, and no spreadsheet between."""


def row(name: str, title: str, table: str) -> Benchmark:
    return short_answers(
        name,
        title,
        {table: "val"},
        "VLMEvalKit vlmeval/dataset/utils/vqa_eval.py (anls)",
        from_sheet,
        lambda text, gold: anls(text, alternatives(from_sheet(gold))),
        also={"lmms_eval": LMMS},
    )


DOCVQA = row("docvqa", "DocVQA", "DocVQA_VAL")
INFOVQA = row("infovqa", "InfoVQA", "InfoVQA_VAL")
