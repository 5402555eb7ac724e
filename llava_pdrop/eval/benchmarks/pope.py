"""POPE: does the picture show it? Three ways to choose what is not there; the paper prints the mean of their F1."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava_pdrop.errors import UserError, clip
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import all_asked, read_lines, unique
from llava_pdrop.eval.benchmarks.prompts import short
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.rules.pope import ALSO, CATEGORIES, MEAN, grade, total


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava_pope_test.jsonl``, labels of ``coco/coco_pope_CATEGORY.json`` (JSON lines), which belong to
    a category's questions one by one, in order."""
    file = directory / "llava_pope_test.jsonl"
    rows = read_lines(file, ("question_id", "image", "text", "category"))
    unique([row["question_id"] for row in rows], file, "question_id")
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
    for name, own in labels.items():
        all_asked(used[name], len(own), file, directory / "coco" / f"coco_pope_{name}.json")
    return questions


def _labels(file: Path) -> list[dict[str, str]]:
    rows = read_lines(file, ("image", "text", "label"))
    for number, row in enumerate(rows, 1):
        if row["label"] not in ("yes", "no"):
            raise UserError(f"{file}: question {number}: its label is {clip(row['label'])}, not yes or no")
    return rows


COCO = "github.com/AoiDragon/POPE (output/coco at e3e39262)"
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
    also=ALSO,
)
