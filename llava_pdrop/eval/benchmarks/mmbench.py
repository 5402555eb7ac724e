"""MMBench in English and Chinese: multiple choice, every question once per rotation of its options.

A question is right if all of its rotations are (rows whose index is the same modulo a million).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.benchmarks.files import cell, find_table, pictures_of_table, read_table
from llava_pdrop.eval.benchmarks.prompts import LETTER, LETTER_CN, mmbench_choice
from llava_pdrop.eval.benchmarks.tables import check_whole, wanted
from llava_pdrop.eval.benchmarks.uploads import write_sheet
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.rules.choices import CHOICE_RULE, grade_choice, options_of
from llava_pdrop.eval.rules.grades import Grade, Statistic, grouped, values_of

ELSEWHERE = ("mmbench", ".")
"""LLaVA's docs/Evaluation.md puts the Chinese table into the directory of the English one."""

COLUMNS = ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
"""Of the server's sheet."""

ROTATION = 1_000_000
ABILITIES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def read(directory: Path, tables: Sequence[str], last: str) -> list[Question]:
    file = find_table(directory, tables, ELSEWHERE)
    rows = read_table(file, ("question", "A", "B", "C", "D", "answer", "image", "category", "l2-category"))
    questions = []
    for row, picture in zip(rows, pictures_of_table(rows, file)):
        index, options, answer = row["index"], options_of(row), row.get("answer")
        if not index.isdecimal():
            raise UserError(f"{file}: index {index} is no number, so its rotations cannot be told")
        if answer is not None and answer not in options:
            raise UserError(f"{file}: index {index}: its answer is {answer}, and its options are {', '.join(options)}")
        facts = {
            "question_id": int(index),
            "options": options,
            "known": answer is not None,
            "category": row.get("category", ""),
            "ability": ABILITIES.get(row.get("l2-category", ""), row.get("l2-category", "")),
            "columns": {name: row.get(name) for name in COLUMNS},
            "split": row.get("split", "dev"),
            "table": file.stem,
        }
        words, unit = mmbench_choice(row, cell(row, "question", file), last), str(int(index) % ROTATION)
        questions.append(ask(index, words, [picture], f"{file}[{index}]", answer or "", unit, **facts))
    check_whole(questions, file)
    return questions


def upload(questions: Sequence[Question], answers: Sequence[str | None], directory: Path, name: str) -> Path:
    """``answers_upload/TABLE/NAME.xlsx`` as the server takes it (``convert_mmbench_for_submission.py``)."""
    rows = [question.facts["columns"] | {"prediction": answer or None} for question, answer in zip(questions, answers)]
    return write_sheet(rows, directory / "answers_upload" / questions[0].facts["table"] / f"{name}.xlsx")


# Rules of its score.


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


def row(name: str, title: str, aliases: tuple[str, ...], tables: Sequence[str], last: str) -> Benchmark:
    return Benchmark(
        name=name,
        title=title,
        aliases=aliases,
        wanted=wanted(tables, source="LLaVA's docs/Evaluation.md", elsewhere=ELSEWHERE),
        rule=f"{CHOICE_RULE}, circular",
        split="dev",
        read=lambda directory, llava: read(directory, tables, last),
        grade=grade_choice,
        total=total,
        headline="circular/Overall",
        factor=100,
        max_new_tokens=1024,
        upload=upload,
    )


MMBENCH = row("mmbench", "MMB", ("MMBench",), ["mmbench_dev_20230712", "MMBench_DEV_EN"], LETTER)
MMBENCH_CN = row("mmbench_cn", "MMB-CN", ("MMBench-CN",), ["mmbench_dev_cn_20231003", "MMBench_DEV_CN"], LETTER_CN)
