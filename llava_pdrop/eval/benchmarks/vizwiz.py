"""VizWiz: questions of blind people about photographs they took. The paper's split is scored by a server only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import answers_by_picture, ask_people, is_there, read_asked, read_json
from llava_pdrop.eval.benchmarks.prompts import short
from llava_pdrop.eval.benchmarks.uploads import all_answered
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import exact_match
from llava_pdrop.eval.rules.vqa import by_form, by_vlmevalkit, eval_ai
from llava_pdrop.files import write_json

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def read(directory: Path, llava: bool) -> list[Question]:
    """The split ``test`` (``llava_test.jsonl``) if ``test.json`` has its answers; else ``val`` (``val.json``, ``val/``)
    if that is there; else ``test`` for the server."""
    known = answers_by_picture(directory / "test.json")
    file = directory / "llava_test.jsonl"
    if known is None and is_there(directory / "val.json", directory / "val", file):
        return _read_val(directory)
    asked = [(row["question_id"], row["text"], row["image"]) for row in read_asked(file)]
    for id, _, image in asked:
        if known is not None and image not in known:
            raise UserError(f"{file}: question_id {id}: test.json has no answers for {image}")
    return _questions(asked, file, known, "test")


def _read_val(directory: Path) -> list[Question]:
    file = directory / "val.json"
    known = answers_by_picture(file)
    if known is None:
        raise UserError(f"{file}: has no answers; fetch it again")
    asked = [(row["image"], short(f"{row['question']}\n{UNANSWERABLE}"), row["image"]) for row in read_json(file)]
    return _questions(asked, file, known, "val")


def _questions(
    asked: Sequence[tuple[str | int, str, str]], file: Path, known: Mapping[str, Sequence[str]] | None, split: str
) -> list[Question]:
    """``asked``: id, text and picture of each question; ``known``: as `answers_by_picture`."""
    questions = []
    for id, text, image in asked:
        facts = {"question_id": id, "image": image, "split": split}
        answers = None if known is None else known[image]
        questions.append(ask_people(str(id), text, file.parent / split / image, file, answers, **facts))
    return questions


def upload(questions: Sequence[Question], answers: Sequence[str | None], directory: Path, name: str) -> Path:
    """``answers_upload/NAME.json`` as the server takes it (LLaVA ``convert_vizwiz_for_submission.py``)."""
    rows = [
        {"image": question.facts["image"], "answer": eval_ai(answer)}
        for question, answer in zip(questions, all_answered(questions, answers))
    ]
    return write_json(directory / "answers_upload" / f"{name}.json", rows, indent=None)


VIZWIZ = Benchmark(
    name="vizwiz",
    title="VizWiz",
    wanted=(
        Wanted("llava_test.jsonl", "LLaVA's eval.zip (docs/Evaluation.md)"),
        Wanted("test", "vizwiz.org (VQA, test images)", "CC BY 4.0"),
        Wanted("val.json", "vizwiz.org (VQA, annotations)", "CC BY 4.0"),
        Wanted("val", "vizwiz.org (VQA, val images)", "CC BY 4.0"),
    ),
    rule="lmms-eval lmms_eval/tasks/vizwiz_vqa/utils.py",
    split="val",
    paper_split="test",
    read=read,
    grade=by_form(eval_ai),
    total=exact_match,
    headline="exact_match",
    factor=100,
    upload=upload,
    also={"vlmevalkit": by_vlmevalkit("answers")},
)
