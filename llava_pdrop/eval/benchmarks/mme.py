"""MME: two questions a picture, one of which is to be answered with yes; 14 categories of up to 200 points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import ask_row, numbered, read_lines, text_of
from llava_pdrop.eval.benchmarks.prompts import SHORT
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, Total, by_word, grouped, values_of
from llava_pdrop.eval.rules.yes_no import four_letters, one_word, without_stops

RELEASE = "MME_Benchmark_release_version"
YES_OR_NO = "Please answer yes or no."
PERCEPTION = ["existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
IN_FULL = {key: f"categories/{{}}/{key}" for key in ("acc", "acc_plus", "score")}


def read(directory: Path, llava: bool) -> list[Question]:
    """Questions of ``llava_mme.jsonl``, whose words leave out what MME's own files end in; labels of those."""
    file = directory / "llava_mme.jsonl"
    rows = read_lines(file, ("question_id", "image", "text"))
    labels: dict[Path, dict[str, str]] = {}
    questions = []
    for id, row in zip(numbered([str(row["question_id"]) for row in rows]), rows):
        name, words = str(row["question_id"]), row["text"]
        category, stem = name.split("/")[0], name.split("/")[-1].split(".")[0]
        if category not in (*PERCEPTION, *COGNITION):
            raise UserError(f"{file}: question_id {name}: MME has no category {category}")
        folder = directory / RELEASE / category
        text = (folder / "questions_answers_YN" if (folder / "images").is_dir() else folder) / f"{stem}.txt"
        if text not in labels:
            labels[text] = _labels(text)
        question = words.replace(SHORT, "").strip() if SHORT in words else words
        ends = ("",) if YES_OR_NO in question else (f" {YES_OR_NO}", f"  {YES_OR_NO}")
        found = [labels[text][question + end] for end in ends if question + end in labels[text]]
        if not found:
            raise UserError(
                f"{file}: question_id {name}: {text} has no line for {question!r}; take both from one release"
            )
        facts = {"unit": f"{category}/{stem}", "category": category}
        questions.append(ask_row(row, directory / RELEASE, file, found[0], id, **facts))
    for unit, times in Counter(question.unit for question in questions).items():
        if times != 2:
            raise UserError(f"{file}: picture {unit} has {times} questions; MME has two of each")
    return questions


def _labels(file: Path) -> dict[str, str]:
    """Question -> Yes or No."""
    pairs = [line.strip().split("\t") for line in text_of(file).split("\n") if line.strip()]
    if any(len(pair) != 2 or pair[1].lower() not in ("yes", "no") for pair in pairs):
        raise UserError(f"{file}: expected a question, a tab, and Yes or No in every line")
    return {question: answer for question, answer in pairs}


# Rules of its score.


def counted(names: Mapping[str, str], groups: tuple[str, str], in_order: bool) -> Total:
    """Points of a category: share of right answers plus share of pictures whose two answers are right, in percent.

    Pictures are pairs of questions, one after the other ``in_order`` within their category (`eval_tool`), or those of
    one file. ``names``: which of acc, acc_plus and score are wanted -> what it is called for a category (``{}``);
    ``groups``: the names of the sums.
    """

    def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
        values = values_of(grades)
        categories = [question.facts["category"] for question in questions]
        rows: dict[str, list[int]] = {}
        for row, question in enumerate(questions):
            rows.setdefault(categories[row] if in_order else question.unit, []).append(row)
        first = np.array([row for own in rows.values() for row in own[::2]], dtype=np.intp)
        second = np.array([row for own in rows.values() for row in own[1::2]], dtype=np.intp)
        single = grouped(values, categories, 100)
        double = grouped(values[first] * values[second], [categories[row] for row in first], 100)

        def statistic(weights: np.ndarray) -> dict[str, float]:
            acc, plus = single(weights), double(weights[first])
            score = {category: acc[category] + plus[category] for category in acc}
            sums = [sum(score.get(category, 0.0) for category in part) for part in (PERCEPTION, COGNITION)]
            found = dict(zip(groups, sums))
            numbers = {"acc": acc, "acc_plus": plus, "score": score}
            for category in acc:
                found |= {name.format(category): numbers[key][category] for key, name in names.items()}
            return found

        return statistic

    return total


MME = Benchmark(
    name="mme",
    title="MME",
    folder="MME",
    wanted=(
        Wanted("llava_mme.jsonl", "LLaVA's eval.zip (docs/Evaluation.md)"),
        Wanted(RELEASE, "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models (MME, on request)"),
    ),
    rule="MME eval_tool/calculation.py",
    split="test",
    read=read,
    grade=by_word(four_letters),
    total=counted(IN_FULL, ("perception", "cognition"), in_order=True),
    headline="perception",
    best=2000,
    also={
        "lmms_eval": Rule(
            "lmms-eval lmms_eval/tasks/mme/utils.py",
            by_word(without_stops),
            counted({"score": "categories/{}"}, ("perception", "cognition"), in_order=False),
        ),
        "vlmevalkit": Rule(
            "VLMEvalKit vlmeval/dataset/utils/yorn.py MME_rating",
            by_word(one_word),
            counted({"score": "{}"}, ("perception", "reasoning"), in_order=False),
        ),
    },
)
