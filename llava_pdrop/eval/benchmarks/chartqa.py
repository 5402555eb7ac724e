"""ChartQA: a number or a word out of a chart; numbers may be 5 % away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_pdrop.eval.benchmarks.tables import short_answers
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, by_text, joined, means
from llava_pdrop.eval.rules.text import alternatives, from_sheet, relaxed

HALVES = {"human": "test_human", "augmented": "test_augmented"}


def total_lmms(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """All questions, those that people wrote, and those made by machine."""
    found = [means(questions, grades, scale=1, overall="relaxed_overall")]
    for name, part in HALVES.items():
        own = np.array([question.facts["part"] == part for question in questions])
        found.append(means(questions, grades, scale=1, overall=f"relaxed_{name}_split", only=own))
    return joined(*found)


CHARTQA = short_answers(
    "chartqa",
    "ChartQA",
    {"ChartQA_TEST": "test"},
    "VLMEvalKit vlmeval/dataset/utils/vqa_eval.py (relaxed_accuracy)",
    lambda answer: from_sheet(answer).strip(),
    lambda text, gold: any(relaxed(text, right) for right in alternatives(from_sheet(gold))),
    by="split",
    also={  # one answer, whose cell is never a list, and blanks at the ends stay
        "lmms_eval": Rule("lmms-eval lmms_eval/tasks/chartqa/utils.py", by_text(str, relaxed), total_lmms)
    },
    licence="GPL-3.0 (github.com/vis-nlp/ChartQA)",
)
