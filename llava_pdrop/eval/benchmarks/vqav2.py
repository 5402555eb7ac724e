"""VQAv2: questions about pictures, each with the answers of ten people. Only a server scores the paper's split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Wanted
from llava_pdrop.eval.benchmarks.files import ask_vqa, is_there, names_of, read_asked, vqa_labels, vqa_questions
from llava_pdrop.eval.benchmarks.prompts import short
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.rules.grades import Grade, Rule, Statistic, exact_match, grader, grouped, joined, means, values_of
from llava_pdrop.eval.rules.vqa import by_form, eval_ai, official, official_accuracy
from llava_pdrop.files import write_json

TEST = "llava_vqav2_mscoco_test-dev2015"
WHOLE_TEST = "llava_vqav2_mscoco_test2015.jsonl"
VAL = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_LABELS = "v2_mscoco_val2014_annotations.json"


def read(directory: Path, llava: bool) -> list[Question]:
    """The split ``test-dev`` if ``annotations.json`` has its answers; else ``val`` if its official files are there;
    else ``test-dev`` for the server, which wants every question of the whole test set
    (``llava_vqav2_mscoco_test2015.jsonl``) in its file."""
    labels = directory / "annotations.json"
    file = directory / f"{TEST}.jsonl"
    if not labels.is_file() and is_there(directory / VAL, directory / "val2014", file):
        return _read_val(directory)
    rows = read_asked(file, question_id=(int,))
    if others := {row["question_id"] for row in rows} - set(names_of(directory / WHOLE_TEST)):
        raise UserError(
            f"{file}: question_id {min(others)}: is not in {WHOLE_TEST}, of whose questions the server wants answers; "
            "take both from one release"
        )
    asked = [(row["question_id"], row["text"], directory / "test2015" / row["image"]) for row in rows]
    return ask_vqa(asked, file, vqa_labels(labels) if labels.is_file() else None, "test-dev")


def _read_val(directory: Path) -> list[Question]:
    file = directory / VAL
    rows = vqa_questions(file)
    pictures = [directory / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg" for row in rows]
    asked = [(row["question_id"], short(row["question"]), picture) for row, picture in zip(rows, pictures)]
    return ask_vqa(asked, file, vqa_labels(directory / VAL_LABELS), "val")


def upload(questions: Sequence[Question], answers: Sequence[str | None], directory: Path, name: str) -> Path:
    """``answers_upload/SPLIT/NAME.json`` (LLaVA ``convert_vqav2_for_submission.py``): every question of the whole test
    set, those that were not asked or answered with ''."""
    file: Path = questions[0].facts["file"]
    if questions[0].facts["split"] == "val":
        ids = [int(question.id) for question in questions]
    else:
        ids = names_of(file.parent / WHOLE_TEST)
    given = {question.id: eval_ai(answer) for question, answer in zip(questions, answers) if answer is not None}
    rows = [{"question_id": id, "answer": given.get(str(id), "")} for id in ids]
    return write_json(directory / "answers_upload" / file.stem / f"{name}.json", rows, indent=None)


# Rules of its score.


@grader
def grade(question: Question, answer: str) -> Grade:
    """What the server makes of the file that LLaVA writes."""
    text = eval_ai(answer)
    return Grade(official_accuracy(text, question.facts["answers"])[0], text)


@grader
def grade_official(question: Question, answer: str) -> Grade:
    return Grade(*official_accuracy(answer, question.facts["answers"]))


def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Percent of all, by type of question and by type of answer."""
    values, parts = values_of(grades), [means(questions, grades, overall="overall")]
    for fact, name in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
        parts.append(grouped(values, [f"{name}/{question.facts[fact]}" for question in questions], 100))
    return joined(*parts)


COCO = "cocodataset.org"
VQA = "visualqa.org/download.html"
VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    wanted=(
        Wanted(f"{TEST}.jsonl", "LLaVA's eval.zip (docs/Evaluation.md)"),
        Wanted(WHOLE_TEST, "LLaVA's eval.zip (docs/Evaluation.md)"),
        Wanted("test2015", f"COCO 2015 test images, {COCO}"),
        Wanted(VAL, VQA, "CC BY 4.0"),
        Wanted(VAL_LABELS, VQA, "CC BY 4.0"),
        Wanted("val2014", f"COCO 2014 val images, {COCO}"),
    ),
    rule="LLaVA scripts/convert_vqav2_for_submission.py, then GT-Vision-Lab/VQA vqaEval.py",
    split="val",
    paper_split="test-dev",
    read=read,
    grade=grade,
    total=total,
    headline="overall",
    upload=upload,
    also={
        "vqa_official": Rule("GT-Vision-Lab/VQA vqaEval.py", grade_official, total),
        "lmms_eval": Rule("lmms-eval lmms_eval/tasks/vqav2/utils.py", by_form(official), exact_match),
    },
)
