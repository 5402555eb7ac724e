"""MME: points of a category, and the sums of perception and cognition, as three projects count them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, Total, by_word, grouped, values_of
from llava_pdrop.eval.rules.yes_no import one_word, without_stops

PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]


def counted(name: Callable[[str, str], list[str]], groups: tuple[str, str], in_order: bool) -> Total:
    """Points of a category: share of right answers plus share of pictures whose two answers are right, in percent.

    Pictures are pairs of questions, one after the other ``in_order`` within their category (`eval_tool`), or those of
    one file. ``name``: (category, which of acc, acc_plus and score) -> the names that it has; ``groups``: those of the
    sums.
    """

    def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
        values = values_of(grades)
        categories = [question.facts["category"] for question in questions]
        rows: dict[str, list[int]] = {}
        for row, question in enumerate(questions):
            rows.setdefault(categories[row] if in_order else question.unit, []).append(row)
        first = np.array([row for own in rows.values() for row in own[::2]], dtype=np.intp)
        second = np.array([row for own in rows.values() for row in own[1::2]], dtype=np.intp)
        single = grouped(values, categories, 100)
        double = grouped(values[first] * values[second], [categories[row] for row in first], 100)

        def statistic(weights: np.ndarray) -> dict[str, float]:
            acc, plus = single(weights), double(weights[first])
            score = {category: acc[category] + plus[category] for category in acc}
            sums = [sum(score.get(category, 0.0) for category in part) for part in (PERCEPTION, COGNITION)]
            found = dict(zip(groups, sums))
            for category in acc:
                for key, numbers in (("acc", acc), ("acc_plus", plus), ("score", score)):
                    found |= dict.fromkeys(name(category, key), numbers[category])
            return found

        return statistic

    return total


def in_full(category: str, key: str) -> list[str]:
    return [f"categories/{category}/{key}"]


def points(prefix: str) -> Callable[[str, str], list[str]]:
    return lambda category, key: [prefix + category] if key == "score" else []


ALSO = {
    "lmms_eval": Rule(
        "lmms-eval lmms_eval/tasks/mme/utils.py",
        by_word(without_stops),
        counted(points("categories/"), ("perception", "cognition"), in_order=False),
    ),
    "vlmevalkit": Rule(
        "VLMEvalKit vlmeval/dataset/utils/yorn.py MME_rating",
        by_word(one_word),
        counted(points(""), ("perception", "reasoning"), in_order=False),
    ),
}
"""Other rules for the same answers."""
