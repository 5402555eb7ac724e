"""OCRVQA: title, author, genre and year of a book from its cover."""

from __future__ import annotations

from llava_pdrop.eval.benchmarks.tables import short_answers
from llava_pdrop.eval.rules.text import alternatives, from_sheet, same

OCRVQA = short_answers(
    "ocrvqa",
    "OCRVQA",
    {"OCRVQA_TESTCORE": "testcore", "OCRVQA_TEST": "test"},
    "VLMEvalKit vlmeval/dataset/utils/vqa_eval.py (accuracy)",
    lambda answer: from_sheet(answer).strip(),
    lambda text, gold: any(same(text, right) for right in alternatives(from_sheet(gold))),
)
