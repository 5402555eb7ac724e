"""SEED-Bench: multiple choice about pictures, and about single frames of videos; the paper prints that of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llava_pdrop.errors import UserError, clip
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import all_asked, ask_row, entries, read_asked, read_json, unique, with_keys
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.choices import CHOICE_RULE, grade_choice
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, Total, by_text, by_word, joined, means
from llava_pdrop.eval.rules.text import MISSING

KEYS = ("question_id", "question_type_id", "data_type", "answer", "choice_a", "choice_b", "choice_c", "choice_d")
VIDEO = "SEED-Bench-video-image"
VALUES = {"answer": "ABCD", "data_type": ("image", "video")}


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava-seed-bench.jsonl``, answers of ``SEED-Bench.json``; those about videos only where their
    frames (``SEED-Bench-video-image``) are."""
    file, labels = directory / "llava-seed-bench.jsonl", directory / "SEED-Bench.json"
    rows = read_asked(file)
    content = with_keys(read_json(labels), ("questions", "question_type"), str(labels), question_type=(dict,))
    types = {str(number): name for name, number in content["question_type"].items()}
    known = {str(label["question_id"]): label for label in entries(content, "questions", KEYS, labels)}
    unique([label["question_id"] for label in content["questions"]], labels, "question_id")
    frames = (directory / VIDEO).is_dir()
    questions = []
    for row in rows:
        id = str(row["question_id"])
        if id not in known:
            raise UserError(f"{file}: question_id {id}: {labels} has no answer for it; take both from one release")
        label = known[id]
        kind = str(label["question_type_id"])
        if kind not in types:
            raise UserError(f"{labels}: question_id {id}: has no question type {clip(kind)}")
        for key, values in VALUES.items():
            if label[key] not in [*values]:
                raise UserError(f"{labels}: question_id {id}: its {key} is {clip(label[key])}, not {', '.join(values)}")
        if label["data_type"] != "image" and not frames:
            continue
        options = {letter: str(label[f"choice_{letter.lower()}"]) for letter in "ABCD"}
        facts = {
            "options": {letter: text for letter, text in options.items() if text not in MISSING},
            "kind": label["data_type"],
            "category": types[kind],
        }
        questions.append(ask_row(row, directory, file, label["answer"], **facts))
    all_asked(len(rows), len(known), file, labels)
    return questions


# Rules of its score.


def parts(names: dict[str, str], scale: float, by: Sequence[str] = ()) -> Total:
    """``names``: image, video and all -> what their numbers are called; ``by``: facts whose groups are counted too."""

    def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
        found: list[Statistic] = []
        for kind, name in names.items():
            own = np.array([kind in ("all", question.facts["kind"]) for question in questions])
            if own.any():
                found.append(means(questions, grades, by if kind == [*names][-1] else (), scale, name, own))
        return joined(*found)

    return total


SEED_BENCH = Benchmark(
    name="seed_bench",
    title="SEED-I",
    aliases=("SEED", "SEED-Image"),
    wanted=(
        Wanted("llava-seed-bench.jsonl", "LLaVA's eval.zip (docs/Evaluation.md)"),
        Wanted("SEED-Bench.json", "github.com/AILab-CVC/SEED-Bench", "CC BY-NC 4.0"),
        Wanted("SEED-Bench-image", "github.com/AILab-CVC/SEED-Bench", "CC BY-NC 4.0"),
        Wanted(VIDEO, "frames by LLaVA's extract_video_frames.py; not in the paper's number"),
    ),
    rule="LLaVA scripts/convert_seed_for_submission.py",
    split="test",
    read=read,
    grade=by_text(str),  # the answer is the letter, and nothing else
    total=parts({"image": "image", "video": "video", "all": "total"}, 100, ["category"]),
    headline="image",
    also={
        "lmms_eval": Rule(
            "lmms-eval lmms_eval/tasks/seedbench/utils.py",
            by_word(lambda answer: answer.strip()[:1]),
            parts({"image": "seed_image", "video": "seed_video", "all": "seed_all"}, 1),
        ),
        "vlmevalkit": Rule(CHOICE_RULE, grade_choice, parts({"image": "Overall"}, 1, ["category"])),
    },
)
