"""Files of every benchmark with another value in one place: read and scored, or refused in one line; no traceback."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks import BENCHMARKS
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.rules.grades import known
from tests.golden.official_scores import PACKED, load_lines, unpacked

OTHERS = (None, 5, True, "", "zzz", [], {}, ["x"])
NOT_READ = {"expected.json", "predictions.jsonl", "questions.json"}


@pytest.fixture
def whole(request, tmp_path) -> tuple[Benchmark, Path]:
    row = BENCHMARKS[request.param]
    shutil.copytree(unpacked(PACKED) / row.folder, tmp_path / row.folder)
    return row, tmp_path / row.folder


@pytest.mark.parametrize("whole", list(BENCHMARKS), indirect=True)
def test_no_value_is_a_traceback(whole) -> None:
    row, directory = whole
    files = [path for path in directory.rglob("*.json*") if "answers" not in path.parts and path.name not in NOT_READ]
    refused = 0
    for file in files:
        content = file.read_text(encoding="utf-8")
        spoilt = [content[: len(content) // 2], "null", "[]", "{}", "[1]", '"x"', *spoilt_values(file)]
        for text in spoilt:
            file.write_text(text, encoding="utf-8")
            refused += outcome(row, directory)
        file.write_text(content, encoding="utf-8")
    assert not outcome(row, directory)
    assert refused >= 10 or not files


def outcome(row: Benchmark, directory: Path) -> bool:
    """Whether the files are refused; else what they ask is scored and written."""
    questions, said = None, ""
    try:
        questions = row.read(directory, True)
    except UserError as error:
        said = str(error)
    if questions is None:
        assert "\n" not in said and str(directory) in said
        return True
    answers = ["yes"] * len(questions)
    for rule in [*([row] if row.grade else []), *row.also.values()] if known(questions) else []:
        grades = [rule.grade(question, answer) for question, answer in zip(questions, answers)]
        rule.total(questions, grades)(np.ones(len(questions)))
    if row.upload is not None:
        row.upload(questions, answers, directory / "out", "own")
    return False


def spoilt_values(file: Path) -> Iterator[str]:
    """The file with each of `OTHERS` in each place of its first record, and without it."""
    lines = file.suffix == ".jsonl" or "coco" in file.parts
    content = load_lines(file) if lines else json.loads(file.read_text(encoding="utf-8"))

    def text(content: Any) -> str:
        return "\n".join(map(json.dumps, content)) if lines else json.dumps(content)

    for path in places(content):
        for other in OTHERS:
            changed, (*before, last) = copy.deepcopy(content), path
            inner = changed
            for key in before:
                inner = inner[key]
            inner[last] = other
            yield text(changed)
        del inner[last]
        yield text(changed)


def places(content: Any, depth: int = 5) -> Iterator[tuple[Any, ...]]:
    """Ways to the values within ``content``: of a list, and of an object of many, only the first."""
    if not depth or not isinstance(content, dict | list) or not content:
        return
    keys = list(content) if isinstance(content, dict) and len(content) < 15 else [next(iter(content))]
    for key in [0] if isinstance(content, list) else keys:
        yield (key,)
        for inner in places(content[key], depth - 1):
            yield (key, *inner)
