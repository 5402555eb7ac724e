"""SEED-Bench: numbers of pictures, of videos and of both, as three projects count them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.choices import CHOICE_RULE, grade_choice
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, Total, by_text, by_word, joined, means

grade = by_text(str)
"""LLaVA: the answer is the letter, and nothing else."""


def parts(names: dict[str, str], scale: float, by: Sequence[str] = ()) -> Total:
    """``names``: image, video and all -> what their numbers are called; ``by``: facts whose groups are counted too."""

    def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
        found: list[Statistic] = []
        for kind, name in names.items():
            own = np.array([kind in ("all", question.facts["kind"]) for question in questions])
            if own.any():
                found.append(means(questions, grades, by if kind == [*names][-1] else (), scale, name, own))
        return joined(*found)

    return total


ALSO = {
    "lmms_eval": Rule(
        "lmms-eval lmms_eval/tasks/seedbench/utils.py",
        by_word(lambda answer: answer.strip()[:1]),
        parts({"image": "seed_image", "video": "seed_video", "all": "seed_all"}, 1),
    ),
    "vlmevalkit": Rule(CHOICE_RULE, grade_choice, parts({"image": "Overall"}, 1, ["category"])),
}
"""Other rules for the same answers."""
