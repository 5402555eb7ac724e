"""ScienceQA: multiple choice out of school books, about half with a picture; the paper prints that of these (IMG)."""

from __future__ import annotations

from pathlib import Path

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import read_json, unique, with_keys
from llava_pdrop.eval.benchmarks.prompts import LETTER
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.rules.scienceqa import ALSO, LETTERS, grade, total
from llava_pdrop.eval.rules.text import MISSING
from llava_pdrop.types import IMAGE_MARKER


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava_test_CQM-A.json``, answers of ``problems.json``; all of the split ``test``, with a picture
    or without."""
    file = directory / "llava_test_CQM-A.json"
    split = with_keys(read_json(directory / "pid_splits.json"), ["test"], str(directory / "pid_splits.json"))["test"]
    problems = with_keys(read_json(directory / "problems.json"), (), str(directory / "problems.json"))
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: expected a list of questions, found {type(rows).__name__}")
    for number, row in enumerate(rows):
        with_keys(row, ("id", "conversations"), f"{file}[{number}]")
        with_keys(row, {"image"} & row.keys(), f"{file}[{number}]")
    unique([row["id"] for row in rows], file, "id")
    if others := {str(row["id"]) for row in rows} ^ set(map(str, split)):
        raise UserError(
            f"{file}: question {min(others)} is not in both this file and the split test of pid_splits.json; take both "
            "from one release"
        )
    questions = []
    for row in rows:
        id = str(row["id"])
        problem = with_keys(
            problems.get(id), ("choices", "answer", "subject"), f"{directory / 'problems.json'}: {id}", answer=(int,)
        )
        if not 0 <= problem["answer"] < len(problem["choices"]) <= len(LETTERS):
            raise UserError(f"{directory / 'problems.json'}: {id}: answer {problem['answer']} is none of its choices")
        turn = with_keys(next(iter(row["conversations"]), None), ["value"], f"{file}: question {id}: conversations[0]")
        text = turn["value"].replace(IMAGE_MARKER, "").strip()
        pictures = [directory / "images" / "test" / row["image"]] if "image" in row else []
        questions.append(
            ask(
                id,
                f"{text}\n{LETTER}",
                pictures,
                f"{file}[{id}]",
                LETTERS[problem["answer"]],
                letters=LETTERS[: len(problem["choices"])],
                options={
                    letter: text for letter, text in zip(LETTERS, map(str, problem["choices"])) if text not in MISSING
                },
                category=problem["subject"],
                image=bool(pictures),
            )
        )
    return questions


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="SQA-I",
    aliases=("SQA", "ScienceQA-IMG"),
    folder="scienceqa",
    wanted=(
        Wanted("llava_test_CQM-A.json", "LLaVA's eval.zip (docs/Evaluation.md)"),
        *(
            Wanted(path, "github.com/lupantech/ScienceQA", "CC BY-NC-SA 4.0")
            for path in ("pid_splits.json", "problems.json", "images/test")
        ),
    ),
    rule="LLaVA llava/eval/eval_science_qa.py",
    split="test",
    read=read,
    grade=grade,
    total=total,
    headline="img_accuracy",
    max_new_tokens=1024,
    also=ALSO,
)
