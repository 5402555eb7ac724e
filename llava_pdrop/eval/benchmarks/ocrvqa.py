"""OCRVQA: title, author, genre and year of a book from its cover."""

from __future__ import annotations

from llava_pdrop.eval.benchmarks.tables import short_answers
from llava_pdrop.eval.rules.text import alternatives, from_sheet, same


def value(answer: str, gold: str) -> float:
    return float(any(same(from_sheet(answer), text) for text in alternatives(from_sheet(gold))))


OCRVQA = short_answers(
    "ocrvqa",
    "OCRVQA",
    {"OCRVQA_TESTCORE": "testcore", "OCRVQA_TEST": "test"},
    "VLMEvalKit vlmeval/dataset/utils/vqa_eval.py (accuracy)",
    value,
    read_as=lambda answer: from_sheet(answer).strip(),
)
