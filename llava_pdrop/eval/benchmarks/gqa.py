"""GQA: questions about the things of a picture, where they are and what they are like, in a word."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import all_asked, ask_row, read_asked, read_json, with_keys
from llava_pdrop.eval.benchmarks.uploads import all_answered
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Rule, by_text, exact_match, means
from llava_pdrop.eval.rules.text import from_sheet, same
from llava_pdrop.files import write_json

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava_gqa_testdev_balanced.jsonl``, answers of ``data/testdev_balanced_questions.json``."""
    file = directory / "llava_gqa_testdev_balanced.jsonl"
    labels = directory / "data" / "testdev_balanced_questions.json"
    rows = read_asked(file)
    known = with_keys(read_json(labels), (), str(labels))
    questions = []
    for row in rows:
        id = str(row["question_id"])
        if id not in known:
            raise UserError(f"{file}: question_id {id}: {labels} has no answer for it; take both from one release")
        gold = with_keys(known[id], ["answer"], f"{labels}: {id}")["answer"]
        questions.append(ask_row(row, directory / "data" / "images", file, gold))
    all_asked(len(rows), len(known), file, labels)
    return questions


def upload(questions: Sequence[Question], answers: Sequence[str | None], directory: Path, name: str) -> Path:
    """``NAME/testdev_balanced_predictions.json``, which GQA's ``eval.py`` takes."""
    rows = [
        {"questionId": question.id, "prediction": prediction(answer)}
        for question, answer in zip(questions, all_answered(questions, answers))
    ]
    return write_json(directory / name / "testdev_balanced_predictions.json", rows, indent=None)


# Rules of its score.


def prediction(answer: str) -> str:
    """As LLaVA hands it to GQA's own code: no full stops at the end, small letters; blanks stay."""
    return answer.rstrip(".").lower()


def words(text: str) -> str:
    """lmms-eval: but for case, outer blanks and punctuation."""
    return text.strip().lower().translate(NO_PUNCTUATION)


GQA = Benchmark(
    name="gqa",
    title="GQA",
    wanted=(
        Wanted("llava_gqa_testdev_balanced.jsonl", "LLaVA's eval.zip (docs/Evaluation.md)"),
        Wanted("data/testdev_balanced_questions.json", "cs.stanford.edu/people/dorarad/gqa (questions)", "CC BY 4.0"),
        Wanted("data/images", "cs.stanford.edu/people/dorarad/gqa (images)"),
    ),
    rule="LLaVA scripts/convert_gqa_for_eval.py, then GQA eval.py",
    split="testdev_balanced",
    read=read,
    grade=by_text(prediction),
    total=lambda questions, grades: means(questions, grades, overall="accuracy"),
    headline="accuracy",
    upload=upload,
    also={
        "lmms_eval": Rule(
            "lmms-eval lmms_eval/api/metrics.py exact_match",
            by_text(words, lambda text, gold: text == words(gold)),
            exact_match,
        ),
        "vlmevalkit": Rule(
            "VLMEvalKit vlmeval/dataset/utils/vqa_eval.py (accuracy)",
            by_text(from_sheet, lambda text, gold: same(text, from_sheet(gold))),
            means,
        ),
    },
)
