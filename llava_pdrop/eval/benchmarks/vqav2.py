"""VQAv2: questions about pictures, each with the answers of ten people. Only a server scores the paper's split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_pdrop.errors import MissingFileError, UserError
from llava_pdrop.eval.benchmarks.base import Benchmark, Grade, Rule, Statistic, Wanted, grader, means
from llava_pdrop.eval.benchmarks.files import answers_of, is_there, read_json, read_lines, unique, with_keys
from llava_pdrop.eval.benchmarks.prompts import short
from llava_pdrop.eval.benchmarks.uploads import write_json
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.rules.vqa import eval_ai, normalised, official, official_accuracy

TEST = "llava_vqav2_mscoco_test-dev2015"
WHOLE_TEST = "llava_vqav2_mscoco_test2015.jsonl"
VAL = "v2_OpenEnded_mscoco_val2014_questions.json"
VAL_LABELS = "v2_mscoco_val2014_annotations.json"
LABEL_KEYS = ("question_id", "answers", "question_type", "answer_type")


def read(directory: Path, llava: bool) -> list[Question]:
    """The split ``test-dev`` if ``annotations.json`` has its answers; else ``val`` if its official files are there;
    else ``test-dev`` for the server, which wants every question of the whole test set
    (``llava_vqav2_mscoco_test2015.jsonl``) in its file."""
    labels = directory / "annotations.json"
    file = directory / f"{TEST}.jsonl"
    if not labels.is_file() and is_there(directory / VAL, directory / "val2014", file):
        return _read_val(directory)
    rows = read_lines(file, ("question_id", "image", "text"), question_id=(int,))
    unique([row["question_id"] for row in rows], file, "question_id")
    if others := {row["question_id"] for row in rows} - set(_whole_test(directory)):
        raise UserError(
            f"{file}: question_id {min(others)}: is not in {WHOLE_TEST}, of whose questions the server wants answers; "
            "take both from one release"
        )
    found = _labels(labels) if labels.is_file() else None
    return [
        _ask(row["question_id"], row["text"], directory / "test2015" / row["image"], file, found, "test-dev")
        for row in rows
    ]


def _whole_test(directory: Path) -> list[int]:
    """Names of the questions that the server wants answered."""
    if not (directory / WHOLE_TEST).is_file():
        raise MissingFileError(
            f"{directory / WHOLE_TEST}: no such file, and the server wants an answer to all of its questions; "
            "`llava-pdrop benchmarks` says where it comes from"
        )
    return [row["question_id"] for row in read_lines(directory / WHOLE_TEST, ["question_id"], question_id=(int,))]


def _read_val(directory: Path) -> list[Question]:
    file = directory / VAL
    rows = with_keys(read_json(file), ["questions"], str(file))["questions"]
    for number, row in enumerate(rows):
        with_keys(
            row,
            ("question_id", "image_id", "question"),
            f"{file}: questions[{number}]",
            question_id=(int,),
            image_id=(int,),
        )
    unique([row["question_id"] for row in rows], file, "question_id")
    found = _labels(directory / VAL_LABELS)
    pictures = [directory / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg" for row in rows]
    return [
        _ask(row["question_id"], short(row["question"]), picture, file, found, "val")
        for row, picture in zip(rows, pictures)
    ]


def _labels(file: Path) -> dict[str, dict[str, Any]]:
    rows = with_keys(read_json(file), ["annotations"], str(file))["annotations"]
    for number, row in enumerate(rows):
        origin = f"{file}: annotations[{number}]"
        row["answers"] = answers_of(with_keys(row, LABEL_KEYS, origin), origin)
    unique([row["question_id"] for row in rows], file, "question_id")
    return {str(row["question_id"]): row for row in rows}


def _ask(
    id: int, text: str, picture: Path, file: Path, labels: dict[str, dict[str, Any]] | None, split: str
) -> Question:
    if labels is None:
        facts: dict[str, Any] = {"known": False}
    elif str(id) not in labels:
        raise UserError(f"{file}: question_id {id}: its annotations have no answers for it; take both from one release")
    else:
        label = labels[str(id)]
        facts = {
            "answers": label["answers"],
            "question_type": label["question_type"],
            "answer_type": label["answer_type"],
        }
    answers = facts.get("answers", [""])
    return ask(
        str(id),
        text,
        [picture],
        f"{file}[{id}]",
        max(answers, key=answers.count),
        question_id=id,
        split=split,
        file=file,
        **facts,
    )


@grader
def grade(question: Question, answer: str) -> Grade:
    """What the server makes of the file that LLaVA writes."""
    text = eval_ai(answer)
    return Grade(official_accuracy(text, question.facts["answers"])[0], text)


@grader
def grade_official(question: Question, answer: str) -> Grade:
    return Grade(*official_accuracy(answer, question.facts["answers"]))


@grader
def grade_lmms(question: Question, answer: str) -> Grade:
    return Grade(*normalised(answer, question.facts["answers"], official))


def total(questions: Sequence[Question], grades: Sequence[Grade]) -> Statistic:
    """Percent of all, by type of question and by type of answer."""
    of_all = means(questions, grades, overall="overall")
    if not all(question.facts.get("known", True) for question in questions):
        return of_all
    parts = [of_all]
    for fact, name in (("question_type", "perQuestionType"), ("answer_type", "perAnswerType")):
        parts.append(means(questions, grades, fact, prefix=f"{name}/", overall=""))
    return lambda weights: {
        name: value for part in parts for name, value in part(weights).items() if not name.endswith("/")
    }


def upload(questions: Sequence[Question], answers: Sequence[str | None], directory: Path, name: str) -> Path:
    """``answers_upload/SPLIT/NAME.json`` (LLaVA ``convert_vqav2_for_submission.py``): every question of the whole test
    set, those that were not asked or answered with ''."""
    given = {question.id: eval_ai(answer) for question, answer in zip(questions, answers) if answer is not None}
    file: Path = questions[0].facts["file"]
    if questions[0].facts["split"] == "val":
        ids = [int(question.id) for question in questions]
    else:
        ids = _whole_test(file.parent)
    rows = [{"question_id": id, "answer": given.get(str(id), "")} for id in ids]
    return write_json(rows, directory / "answers_upload" / file.stem / f"{name}.json")


COCO = "cocodataset.org"
VQA = "visualqa.org/download.html"
VQAV2 = Benchmark(
    name="vqav2",
    title="VQAv2",
    folder="vqav2",
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
        "lmms_eval": Rule(
            "lmms-eval lmms_eval/tasks/vqav2/utils.py",
            grade_lmms,
            lambda questions, grades: means(questions, grades, scale=1, overall="exact_match"),
        ),
    },
)
