"""POPE: does the picture show it? Three ways to choose what is not there; the paper prints the mean of their F1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Grade, Statistic, Wanted
from llava_pdrop.eval.benchmarks.files import read_lines, unique
from llava_pdrop.eval.benchmarks.prompts import short
from llava_pdrop.eval.questions import Question, ask

CATEGORIES = ("adversarial", "popular", "random")
MEAN = "mean_of_three"


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava_pope_test.jsonl``, labels of ``coco/coco_pope_CATEGORY.json`` (JSON lines), which belong to
    a category's questions one by one, in order."""
    file = directory / "llava_pope_test.jsonl"
    rows = read_lines(file, ("question_id", "image", "text", "category"))
    unique([row["question_id"] for row in rows], file, "question_id")
    labels = {name: _labels(directory, name) for name in CATEGORIES}
    used: dict[str, int] = defaultdict(int)
    questions = []
    for row in rows:
        name = row["category"]
        if name not in labels or used[name] >= len(labels[name]):
            raise UserError(f"{file}: question_id {row['question_id']}: coco_pope_{name}.json has no label for it")
        label = labels[name][used[name]]
        used[name] += 1
        if short(label["text"]) != row["text"] or label["image"] != row["image"]:
            raise UserError(
                f"{file}: question_id {row['question_id']}: coco_pope_{name}.json has another question in its place; "
                "take both files from one release"
            )
        picture = directory / "val2014" / row["image"]
        origin = f"{file}[{row['question_id']}]"
        questions.append(
            ask(
                str(row["question_id"]),
                row["text"],
                [picture],
                origin,
                label["label"],
                category=name,
                question_id=row["question_id"],
            )
        )
    return questions


def _labels(directory: Path, name: str) -> list[dict[str, str]]:
    return read_lines(directory / "coco" / f"coco_pope_{name}.json", ("image", "text", "label"))


def said(answer: str) -> str:
    """``no`` if one of these words stands before the first full stop, else ``yes``."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def grade(question: Question, answer: str | None) -> Grade:
    """LLaVA's word against the label. An answer that was never given is the wrong word, whichever that is."""
    if answer is None:
        return Grade(0.0, "no" if question.gold == "yes" else "yes", answered=False)
    word = said(answer)
    return Grade(float(word == question.gold), word)


def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Accuracy, precision, recall, F1 and share of yes by category, and the means of the three."""
    yes = np.array([grade.read == "yes" for grade in grades])
    true = np.array([question.gold == "yes" for question in questions])
    rows = {name: np.array([question.facts["category"] == name for question in questions]) for name in CATEGORIES}

    def statistic(weights: np.ndarray) -> dict[str, float]:
        by_name = {}
        for name, own in rows.items():
            w = weights * own
            hit, false_alarm, miss = w @ (yes & true), w @ (yes & ~true), w @ (~yes & true)
            rest = w.sum() - hit - false_alarm - miss
            precision = _share(hit, hit + false_alarm)
            recall = _share(hit, hit + miss)
            by_name[name] = {
                "accuracy": _share(hit + rest, w.sum()),
                "precision": precision,
                "recall": recall,
                "f1": _share(2 * precision * recall, precision + recall),
                "yes_ratio": _share(hit + false_alarm, w.sum()),
            }
        by_name[MEAN] = {key: sum(by_name[name][key] for name in rows) / len(rows) for key in by_name[CATEGORIES[0]]}
        return {f"{name}/{key}": value for name, found in by_name.items() for key, value in found.items()}

    return statistic


def _share(part: float, whole: float) -> float:
    """0 of nothing: where the official code divides by zero."""
    return float(part / whole) if whole else 0.0


COCO = "github.com/AoiDragon/POPE (output/coco)"
POPE = Benchmark(
    name="pope",
    title="POPE",
    folder="pope",
    wanted=(
        Wanted("llava_pope_test.jsonl", "LLaVA's eval.zip (docs/Evaluation.md)"),
        *(Wanted(f"coco/coco_pope_{name}.json", COCO, "MIT") for name in CATEGORIES),
        Wanted("val2014", "COCO 2014 val images, cocodataset.org", "CC BY 4.0 (annotations)"),
    ),
    rule="LLaVA llava/eval/eval_pope.py",
    split="test",
    read=read,
    grade=grade,
    total=total,
    headline=f"{MEAN}/f1",
    factor=100,
)
