"""MMBench: three ways to count a question that is asked once per rotation of its options."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Statistic, grouped, values_of

ROTATION = 1_000_000
ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Three ways to count, each of all, by ability and by category: ``circular`` (every rotation right), ``vanilla_0``
    (unrotated rows alone), ``vanilla_all`` (every row alone)."""
    values = values_of(grades)
    units: dict[str, list[int]] = {}
    for row, question in enumerate(questions):
        units.setdefault(question.unit, []).append(row)
    indices = np.array([int(question.id) for question in questions])
    plain = np.flatnonzero(indices < ROTATION)
    circular = np.array([values[units[questions[row].unit]].min() for row in plain.tolist()])
    low = np.flatnonzero(indices <= ROTATION)  # VLMEvalKit counts a rotation of index 0 among them
    parts = []
    for name, rows, own in (
        ("circular", plain, circular),
        ("vanilla_0", low, values[low]),
        ("vanilla_all", np.arange(len(values)), values),
    ):
        parts.append((rows, grouped(own, [f"{name}/Overall"] * len(rows))))
        for fact in ("ability", "category"):
            parts.append((rows, grouped(own, [f"{name}/{questions[row].facts[fact]}" for row in rows.tolist()])))

    def statistic(weights: np.ndarray) -> dict[str, float]:
        return {name: value for rows, part in parts for name, value in part(weights[rows]).items()}

    return statistic
