"""POPE: does the picture show it? Three ways to choose what is not there; the paper prints the mean of their F1."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_pdrop.errors import UserError, clip
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import all_asked, ask_row, read_asked, read_lines
from llava_pdrop.eval.benchmarks.prompts import short
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, Total, by_word, values_of
from llava_pdrop.eval.rules.yes_no import no_among_words, one_word, rates, share, whole_answer

CATEGORIES = ("adversarial", "popular", "random")
MEAN = "mean_of_three"


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava_pope_test.jsonl``, labels of ``coco/coco_pope_CATEGORY.json`` (JSON lines), which belong to
    a category's questions one by one, in order."""
    file = directory / "llava_pope_test.jsonl"
    rows = read_asked(file, "category")
    labels = {name: _labels(directory / "coco" / f"coco_pope_{name}.json") for name in CATEGORIES}
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
        questions.append(ask_row(row, directory / "val2014", file, label["label"], category=name))
    for name, own in labels.items():
        all_asked(used[name], len(own), file, directory / "coco" / f"coco_pope_{name}.json")
    return questions


def _labels(file: Path) -> list[dict[str, str]]:
    rows = read_lines(file, ("image", "text", "label"))
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("yes", "no"):
            raise UserError(f"{file}: question {number}: its label is {clip(row['label'])}, not yes or no")
    return rows


# Rules of its score.


def grade(question: Question, answer: str | None) -> Grade:
    """LLaVA's word against the label. An answer that was never given is the wrong word, whichever that is."""
    if answer is None:
        return Grade(0.0, "no" if question.gold == "yes" else "yes", answered=False)
    word = no_among_words(answer)
    return Grade(float(word == question.gold), word)


def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Accuracy, precision, recall, F1 and share of yes by category, and the means of the three (`eval.limit` may leave
    questions of fewer)."""
    yes = np.array([grade.read == "yes" for grade in grades])
    true = np.array([question.gold == "yes" for question in questions])
    rows = {name: np.array([question.facts["category"] == name for question in questions]) for name in CATEGORIES}
    rows = {name: own for name, own in rows.items() if own.any()}

    def statistic(weights: np.ndarray) -> dict[str, float]:
        by_name = {}
        for name, own in rows.items():
            w = weights * own
            by_name[name] = rates(w, true, yes, ~yes, yes == true) | {"yes_ratio": share(w @ yes, w.sum())}
        by_name[MEAN] = {key: sum(by_name[name][key] for name in rows) / len(rows) for key in by_name[next(iter(rows))]}
        return {f"{name}/{key}": value for name, found in by_name.items() for key, value in found.items()}

    return statistic


def total_of(names: dict[str, str], pooled: str, scale: float, misses: tuple[str, ...]) -> Total:
    """Numbers of all questions together (``pooled``) and by category, of the projects that do not take every answer for
    one of the two words.

    ``names``: accuracy, precision, recall, f1 and label_ratio -> what they are called; ``misses``: what is read in an
    answer that counts as no where the label is yes.
    """

    def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
        right = values_of(grades) == 1
        read = [grade.read.lower() for grade in grades]
        true = np.array([question.gold == "yes" for question in questions])
        yes, no = np.array([word == "yes" for word in read]), np.array([word in misses for word in read])
        rows = {pooled: np.ones(len(questions))}
        rows |= {name: np.array([question.facts["category"] == name for question in questions]) for name in CATEGORIES}

        def statistic(weights: np.ndarray) -> dict[str, float]:
            numbers: dict[str, float] = {}
            for group, own in rows.items():
                w = weights * own
                found = rates(w, true, yes, no, right) | {"label_ratio": share(w @ true, w.sum())}
                numbers |= {f"{group}/{name}": scale * found[key] for key, name in names.items()}
            return numbers

        return statistic

    return total


LMMS = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1", "label_ratio": "yes_ratio"}
VLMEVALKIT = {"f1": "Overall", "accuracy": "acc", "precision": "precision", "recall": "recall"}

COCO = "github.com/AoiDragon/POPE (output/coco at e3e39262)"
POPE = Benchmark(
    name="pope",
    title="POPE",
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
    also={
        "lmms_eval": Rule(
            "lmms-eval lmms_eval/tasks/pope/utils.py", by_word(whole_answer), total_of(LMMS, "pooled", 1, ("no",))
        ),
        "vlmevalkit": Rule(
            "VLMEvalKit vlmeval/dataset/utils/yorn.py POPE_rating",
            by_word(one_word),
            total_of(VLMEVALKIT, "Overall", 100, ("no", "unknown")),
        ),
    },
)
