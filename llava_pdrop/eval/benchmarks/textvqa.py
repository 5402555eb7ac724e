"""TextVQA: what is written in a picture; LLaVA's prompt brings the words that a text reader found in it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava_pdrop.errors import UserError, clip
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import all_asked, ask_people, entries, numbered, read_json, read_lines
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Rule, exact_match, means
from llava_pdrop.eval.rules.vqa import by_form, by_vlmevalkit, eval_ai

TOKENS = "Reference OCR token: "
PEOPLE = 10


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava_textvqa_val_v051_ocr.jsonl``, answers of ``TextVQA_0.5.1_val.json``: of the annotation with
    the same picture and the same question but for case. Of several, the last counts; ``own`` is the one in the same
    place among them."""
    file, labels = directory / "llava_textvqa_val_v051_ocr.jsonl", directory / "TextVQA_0.5.1_val.json"
    rows = read_lines(file, ("question_id", "image", "text"))
    found: dict[tuple[str, str], list[list[str]]] = defaultdict(list)
    for number, label in enumerate(entries(read_json(labels), "data", ("image_id", "question", "answers"), labels)):
        origin = f"{labels}: data[{number}]"
        if others := [answer for answer in label["answers"] if not isinstance(answer, str)]:
            raise UserError(f"{origin}: one of its answers is {clip(repr(others[0]))}, not text")
        if len(label["answers"]) != PEOPLE:
            raise UserError(f"{origin}: has {len(label['answers'])} answers; the rule is made for {PEOPLE}")
        found[str(label["image_id"]), label["question"].lower()].append(label["answers"])
    times: dict[tuple[str, str], int] = defaultdict(int)
    questions = []
    for id, row in zip(numbered([str(row["question_id"]) for row in rows]), rows):
        key = str(row["question_id"]), asked(row["text"], f"{file}: question_id {id}").lower()
        if key not in found:
            raise UserError(f"{file}: question_id {id}: {labels} has no question {clip(key[1])!r} about this picture")
        own = found[key][min(times[key], len(found[key]) - 1)]
        times[key] += 1
        picture = directory / "train_images" / row["image"]
        facts = {"question_id": row["question_id"], "own": own}
        questions.append(ask_people(id, row["text"], picture, file, found[key][-1], **facts))
    all_asked(len(rows), sum(map(len, found.values())), file, labels)
    return questions


def asked(text: str, origin: str) -> str:
    """The question within LLaVA's prompt: the first of three lines with OCR tokens, or of two without.

    Raises:
        UserError: another number of lines: where the question ends cannot be told (``eval_textvqa.py`` stops there).
    """
    lines = text.split("\n")
    if len(lines) == 3 and TOKENS in text:
        return lines[1] if text.startswith(TOKENS.strip()) else lines[0]
    if len(lines) != 2:
        raise UserError(
            f"{origin}: its text has {len(lines)} lines; expected the question, its OCR tokens, and what is asked"
        )
    return lines[0]


TEXTVQA = Benchmark(
    name="textvqa",
    title="TextVQA",
    wanted=(
        Wanted("llava_textvqa_val_v051_ocr.jsonl", "LLaVA's eval.zip (docs/Evaluation.md)"),
        Wanted("TextVQA_0.5.1_val.json", "textvqa.org", "CC BY 4.0"),
        Wanted("train_images", "textvqa.org (train_val_images.zip)"),
    ),
    rule="LLaVA llava/eval/eval_textvqa.py",
    split="val",
    read=read,
    grade=by_form(eval_ai),
    total=lambda questions, grades: means(questions, grades, overall="accuracy"),
    headline="accuracy",
    also={
        "lmms_eval": Rule(
            "lmms-eval lmms_eval/tasks/textvqa/utils.py",
            by_form(eval_ai, "own"),  # the same of the question's own annotation
            exact_match,
        ),
        "vlmevalkit": by_vlmevalkit("own"),
    },
)
