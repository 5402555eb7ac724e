"""Small directories in the official layouts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Rule

PICTURE = "iVBORw0KGgo" + "A" * 80
SHORT = "\nAnswer the question using a single word or phrase."


def write_json(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


def write_lines(file: Path, rows: Sequence[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def write_table(file: Path, head: str, *rows: str) -> Path:
    """Cells stand between ``|``; ``@`` is a picture."""
    lines = [line.replace("@", PICTURE).replace("|", "\t") for line in (head, *rows)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def numbers(
    benchmark: Benchmark | Rule, questions: Sequence[Question], answers: Sequence[str | None]
) -> dict[str, float]:
    """What `total` makes of ``answers``."""
    grades = [benchmark.grade(question, answer) for question, answer in zip(questions, answers)]
    return benchmark.total(questions, grades)(np.ones(len(questions)))


def ask_of(id: Any, image: str, question: str, **others: Any) -> dict[str, Any]:
    """A line of LLaVA's question files."""
    return {"question_id": id, "image": image, "text": question + SHORT, **others}
