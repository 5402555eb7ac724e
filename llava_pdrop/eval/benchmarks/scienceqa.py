"""ScienceQA: multiple choice out of school books, about half with a picture; the paper prints that of these (IMG)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import read_json, unique, with_keys
from llava_pdrop.eval.benchmarks.prompts import LETTER
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.rules.choices import CHOICE_RULE, grade_choice
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, Total, by_text, by_word, joined, means
from llava_pdrop.eval.rules.text import MISSING
from llava_pdrop.types import IMAGE_MARKER

LETTERS = "ABCDE"
ANSWER_IS = re.compile("The answer is ([A-Z]).")
FAILED = "FAILED"


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava_test_CQM-A.json``, answers of ``problems.json``; all of the split ``test``, with a picture
    or without."""
    file, splits, labels = (directory / f"{name}.json" for name in ("llava_test_CQM-A", "pid_splits", "problems"))
    split = with_keys(read_json(splits), ["test"], str(splits))["test"]
    problems = with_keys(read_json(labels), (), str(labels))
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
        problem = with_keys(problems.get(id), ("choices", "answer", "subject"), f"{labels}: {id}", answer=(int,))
        if not 0 <= problem["answer"] < len(problem["choices"]) <= len(LETTERS):
            raise UserError(f"{labels}: {id}: answer {problem['answer']} is none of its choices")
        turn = with_keys(next(iter(row["conversations"]), None), ["value"], f"{file}: question {id}: conversations[0]")
        text = turn["value"].replace(IMAGE_MARKER, "").strip()
        pictures = [directory / "images" / "test" / row["image"]] if "image" in row else []
        options = {letter: text for letter, text in zip(LETTERS, map(str, problem["choices"])) if text not in MISSING}
        facts = {"options": options, "category": problem["subject"]}
        questions.append(ask(id, f"{text}\n{LETTER}", pictures, f"{file}[{id}]", LETTERS[problem["answer"]], **facts))
    return questions


# Rules of its score.


def parsed(answer: str) -> str:
    """The letter that LLaVA reads: alone, in front of a full stop and a blank, or behind the one "The answer is"."""
    if answer[:1] in [*LETTERS] and answer[1:3] in ("", ". "):
        return answer[0]
    found = ANSWER_IS.findall(answer)
    return found[0] if len(found) == 1 else FAILED


def letter_of(answer: str) -> str:
    """lmms-eval: the letter, or a capital in front of a full stop."""
    text = answer.strip()
    return text[0] if len(text) >= 2 and text[0] in string.ascii_uppercase and text[1] == "." else text


def pictured(questions: Sequence[Question], grades: Sequence[Grade]) -> np.ndarray:
    """Mask of the questions with a picture. One that was never answered is not among them: the official code looks for
    the picture in the answer file."""
    return np.array([bool(question.record.images) and grade.answered for question, grade in zip(questions, grades)])


def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Share of right answers of all, and of those with a picture."""
    of_pictures = means(questions, grades, overall="img_accuracy", only=pictured(questions, grades))
    return joined(means(questions, grades, overall="accuracy"), of_pictures)


def total_of_pictures(name: str, by: Sequence[str] = ()) -> Total:
    return lambda questions, grades: means(questions, grades, by, 1, name, pictured(questions, grades))


SCIENCEQA = Benchmark(
    name="scienceqa",
    title="SQA-I",
    aliases=("SQA", "ScienceQA-IMG"),
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
    grade=by_text(parsed),
    total=total,
    headline="img_accuracy",
    max_new_tokens=1024,
    also={
        "lmms_eval": Rule(
            "lmms-eval lmms_eval/tasks/scienceqa/utils.py", by_word(letter_of), total_of_pictures("exact_match")
        ),
        "vlmevalkit": Rule(CHOICE_RULE, grade_choice, total_of_pictures("Overall", ["category"])),
    },
)
