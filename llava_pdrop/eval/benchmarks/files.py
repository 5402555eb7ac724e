"""The layouts that benchmarks come in, read and checked: LLaVA's JSON and JSON lines, the JSON of VQA and VizWiz, and
VLMEvalKit's TSV.

A file that is not what its benchmark expects is one line that names it: a row, a column or key, and what is wrong.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_pdrop.data.readers.pictures import InlinePicture
from llava_pdrop.errors import MissingFileError, UserError, clip
from llava_pdrop.eval.questions import Question, ask
from llava_pdrop.eval.rules.text import MISSING
from llava_pdrop.types import ImageSource

ROOT = "playground/data/eval"
"""Where LLaVA's scripts expect the benchmarks, below the checkout."""

NAME = (str, int)
KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "image_id", "index", "question_id", "question_type_id"), NAME),
    **dict.fromkeys(("choice_a", "choice_b", "choice_c", "choice_d"), (str, int, float)),
    **dict.fromkeys(("annotations", "answers", "choices", "conversations", "data", "questions", "test"), (list,)),
}
"""Key -> what it holds, if not text."""

CALLED = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}

REFERENCE = 64
"""Letters of an image cell up to which it is the index of another row, whose picture is meant (VLMEvalKit)."""


def text_of(file: Path) -> str:
    """The text of a file; a mark of its byte order in front, which some editors put there, does not count.

    Raises:
        MissingFileError: no such file. UserError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"{file}: no such file; `llava-pdrop benchmarks` says where it comes from") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not text in UTF-8 ({clip(error)}); unpack it, or fetch it again") from None


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        MissingFileError: no such file. UserError: it is not JSON.
    """
    text = text_of(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({clip(error)}); fetch it again") from None


def read_lines(file: Path, keys: Sequence[str], **kinds: tuple[type, ...]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, each of which has ``keys`` (as `with_keys`).

    Raises:
        MissingFileError: no such file. UserError: no lines, a line that is no object, or lacks a key.
    """
    rows = []
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}:{number}: not JSON ({clip(error)}); fetch the file again") from None
        rows.append(with_keys(row, keys, f"{file}:{number}", **kinds))
    if not rows:
        raise UserError(f"{file}: holds no questions; fetch it again")
    return rows


def with_keys(row: Any, keys: Iterable[str], origin: str, **kinds: tuple[type, ...]) -> dict[str, Any]:
    """``row``, an object that has all ``keys``, each of which holds what ``kinds``, else `KINDS` says.

    Raises:
        UserError: it has not.
    """
    if not isinstance(row, dict):
        raise UserError(f"{origin}: expected an object, found {type(row).__name__}")
    if lacking := [key for key in keys if key not in row]:
        raise UserError(f"{origin}: has no {', '.join(map(repr, lacking))}, only {clip(', '.join(map(repr, row)))}")
    for key in keys:
        expected = kinds.get(key) or KINDS.get(key, (str,))
        if not isinstance(row[key], expected) or row[key] is True or row[key] is False:
            raise UserError(
                f"{origin}: its {key} is {clip(repr(row[key]))}, not {' or '.join(CALLED[kind] for kind in expected)}"
            )
    return row


def read_asked(file: Path, *keys: str, **kinds: tuple[type, ...]) -> list[dict[str, Any]]:
    """The questions of a file of LLaVA's (as `read_lines`), each with a ``question_id`` of its own."""
    rows = read_lines(file, ("question_id", "image", "text", *keys), **kinds)
    unique([row["question_id"] for row in rows], file, "question_id")
    return rows


def ask_row(row: Mapping[str, Any], folder: Path, file: Path, gold: str, id: str = "", **facts: Any) -> Question:
    """The question of a ``row`` of LLaVA's ``file``, about its picture in ``folder``, called ``id`` or as it is called
    there."""
    name, id = row["question_id"], id or str(row["question_id"])
    return ask(id, row["text"], [folder / row["image"]], f"{file}[{id}]", gold, question_id=name, **facts)


def entries(
    content: Any, name: str, keys: Sequence[str], file: Path, **kinds: tuple[type, ...]
) -> list[dict[str, Any]]:
    """The objects of the list ``name`` in the content of a JSON file, each of which has ``keys`` (as `with_keys`).

    Raises:
        UserError: there is no such list, or an entry is no object or lacks a key.
    """
    rows = with_keys(content, [name], str(file))[name]
    return [with_keys(row, keys, f"{file}: {name}[{number}]", **kinds) for number, row in enumerate(rows)]


def answers_of(label: Mapping[str, Any], origin: str) -> list[str]:
    """What the people of a label answered.

    Raises:
        UserError: nobody did, or an entry is no answer.
    """
    if not label["answers"]:
        raise UserError(f"{origin}: its answers are an empty list; fetch the file again")
    return [with_keys(entry, ("answer",), origin)["answer"] for entry in label["answers"]]


def answers_by_picture(file: Path) -> dict[str, list[str]] | None:
    """Picture -> the answers of all people, in VizWiz' file of annotations; None if it is not there, or has none.

    Raises:
        UserError: it is no list of questions, has a picture twice, or only some of them have answers.
    """
    if not file.is_file():
        return None
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: expected a list of questions")
    for number, row in enumerate(rows):
        with_keys(row, ("image", "question"), f"{file}[{number}]")
    if "answers" not in rows[0]:
        return None
    unique([row["image"] for row in rows], file, "image")
    return {
        row["image"]: answers_of(with_keys(row, ["answers"], f"{file}[{number}]"), f"{file}[{number}]")
        for number, row in enumerate(rows)
    }


def vqa_questions(file: Path) -> list[dict[str, Any]]:
    """The entries of VQA's official file of questions, each of which has a ``question_id`` of its own."""
    keys = ("question_id", "image_id", "question")
    rows = entries(read_json(file), "questions", keys, file, question_id=(int,), image_id=(int,))
    unique([row["question_id"] for row in rows], file, "question_id")
    return rows


def vqa_labels(file: Path) -> dict[str, dict[str, Any]]:
    """Question -> its entry in VQA's official file of annotations, whose ``answers`` are texts (as `answers_of`)."""
    rows = entries(read_json(file), "annotations", ("question_id", "answers", "question_type", "answer_type"), file)
    for number, row in enumerate(rows):
        row["answers"] = answers_of(row, f"{file}: annotations[{number}]")
    unique([row["question_id"] for row in rows], file, "question_id")
    return {str(row["question_id"]): row for row in rows}


def ask_people(
    id: str, text: str, picture: Path, file: Path, answers: Sequence[str] | None, /, **facts: Any
) -> Question:
    """A question that several people answered; what most of them said is its gold. ``answers`` is None where only a
    server knows."""
    gold = max(answers, key=answers.count) if answers else ""
    known = answers is not None
    return ask(id, text, [picture], f"{file}[{id}]", gold, answers=answers, known=known, **facts)


def ask_vqa(
    asked: Sequence[tuple[int, str, Path]], file: Path, labels: Mapping[str, Mapping[str, Any]] | None, split: str
) -> list[Question]:
    """Questions of VQA: ``asked`` is id, text and picture of each, ``labels`` as `vqa_labels` or, where only a server
    has them, None.

    Raises:
        UserError: a question has no label.
    """
    questions = []
    for id, text, picture in asked:
        if labels is not None and str(id) not in labels:
            raise UserError(
                f"{file}: question_id {id}: its annotations have no answers for it; take both from one release"
            )
        label = labels[str(id)] if labels is not None else {}
        kinds = {key: label[key] for key in ("question_type", "answer_type") if key in label}
        facts = {"question_id": id, "split": split, "file": file, **kinds}
        questions.append(ask_people(str(id), text, picture, file, label.get("answers"), **facts))
    return questions


def names_of(file: Path) -> list[int]:
    """Names of the questions that a server wants answered.

    Raises:
        MissingFileError: no such file. UserError: as `read_lines`.
    """
    if not file.is_file():
        raise MissingFileError(
            f"{file}: no such file, and the server wants an answer to all of its questions; "
            "`llava-pdrop benchmarks` says where it comes from"
        )
    return [row["question_id"] for row in read_lines(file, ["question_id"], question_id=(int,))]


def all_asked(asked: int, known: int, file: Path, labels: Path) -> None:
    """Raises `UserError` if there are more answers than questions: ``file`` is cut off, or of another release."""
    if known > asked:
        raise UserError(
            f"{file}: has {asked} questions, and {labels} the answers of {known}; take both whole and from one release "
            "(eval.limit asks fewer)"
        )


def read_table(file: Path, columns: Sequence[str], whole: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a TSV file as VLMEvalKit has them, as text; missing cells are not in them, but for those of the
    columns ``whole``, which stay what they are.

    Raises:
        MissingFileError: no such file. UserError: it lacks one of ``columns``, a row of another length, the same
            ``index`` twice, or no rows.
    """
    csv.field_size_limit(sys.maxsize)
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            head, *rows = list(csv.reader(opened, delimiter="\t")) or [[]]
    except FileNotFoundError:
        raise MissingFileError(f"{file}: no such file; `llava-pdrop benchmarks` says where it comes from") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: no table as text in UTF-8 ({clip(error)}); unpack it, or fetch it again") from None
    if lacking := [name for name in ("index", *columns) if name not in head]:
        raise UserError(f"{file}: has no column {', '.join(map(repr, lacking))}, only {clip(', '.join(head))}")
    if len(set(head)) < len(head):
        raise UserError(f"{file}: has two columns of one name: {clip(', '.join(head))}")
    table = []
    for number, row in enumerate(rows, 2):
        if len(row) != len(head):
            raise UserError(f"{file}: row {number}: has {len(row)} cells, and the head has {len(head)}")
        table.append({name: cell for name, cell in zip(head, row) if name in whole or cell not in MISSING})
        if "index" not in table[-1]:
            raise UserError(f"{file}: row {number}: has no index")
    if not table:
        raise UserError(f"{file}: holds no questions; fetch it again")
    unique([row["index"] for row in table], file, "index")
    return table


def unique(names: Sequence[Any], file: Path, key: str) -> None:
    """Raises `UserError` if a name is there twice: an answer could not be told from another."""
    for name, times in Counter(map(str, names)).most_common(1):
        if times > 1:
            raise UserError(f"{file}: {key} {clip(name)} is there {times} times; every question needs its own")


def cell(row: Mapping[str, str], name: str, file: Path) -> str:
    """A cell of a row of `read_table`. Raises `UserError`: it is missing."""
    if name not in row:
        raise UserError(f"{file}: index {row['index']}: has no {name}")
    return row[name]


def numbered(names: Sequence[str]) -> list[str]:
    """Names that stand for one question each: where one is there again (MME and TextVQA call questions by their
    picture), its second occurrence is ``name#2``."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return result


def pictures_of_table(rows: Sequence[Mapping[str, str]], file: Path) -> list[ImageSource]:
    """The picture of every row of a TSV.

    Raises:
        UserError: a row without one, or a reference to a row that is not there.
    """
    by_index = {row["index"]: row.get("image", "") for row in rows}
    pictures: list[ImageSource] = []
    for row in rows:
        image = cell(row, "image", file)
        if len(image) <= REFERENCE:
            if image not in by_index or len(by_index[image]) <= REFERENCE:
                raise UserError(f"{file}: index {row['index']}: its image is that of row {clip(image)}, which has none")
            image = by_index[image]
        pictures.append(InlinePicture(image))
    return pictures


def find_table(directory: Path, names: Sequence[str], elsewhere: Sequence[str] = (".",)) -> Path:
    """The TSV file of a benchmark: in its own directory, or in one of ``elsewhere`` below the one above: as VLMEvalKit
    keeps them, in that itself.

    Raises:
        MissingFileError: none has one.
    """
    for parent in (directory, *(directory.parent / name for name in elsewhere)):
        for name in names:
            if (parent / f"{name}.tsv").is_file():
                return parent / f"{name}.tsv"
    raise MissingFileError(
        f"{directory}: has no {' or '.join(f'{name}.tsv' for name in names)}, nor has {directory.parent}; `llava-pdrop "
        "benchmarks` says where it comes from"
    )


def is_there(questions: Path, pictures: Path, others: Path) -> bool:
    """Whether a split is: its ``questions``, and its ``pictures`` if those of the split ``others`` could be meant
    instead (an archive of annotations has those of every split)."""
    return questions.is_file() and (pictures.is_dir() or not others.is_file())


ANSWER_KEYS = (("question_id", "text"), ("index", "prediction"))
"""What LLaVA and VLMEvalKit call the name of a question and its answer."""


def read_answers(file: Path, questions: Sequence[Question]) -> list[str | None]:
    """Answers (JSON lines, in LLaVA's keys or VLMEvalKit's), one per question, None where there is none.

    Where several questions have one name (MME, TextVQA), their answers are in their order.

    Raises:
        MissingFileError: no such file. UserError: a line without these keys, an answer that is no text, one for a
            question that is not asked, more for a question than it is asked, or half of them missing. Nothing is scored
            then.
    """
    places = {question.id: place for place, question in enumerate(questions)}
    answers: list[str | None] = [None] * len(questions)
    seen: Counter[str] = Counter()
    for number, row in enumerate(read_lines(file, ()), 1):
        origin = f"{file}: answer {number}"
        name, text = next((keys for keys in ANSWER_KEYS if keys[0] in row), ANSWER_KEYS[0])
        with_keys(row, (name, text), origin, **{text: (object,)})
        id = str(row[name])
        seen[id] += 1
        own = id if seen[id] == 1 else f"{id}#{seen[id]}"
        if own not in places:
            wrong = f"is there {seen[id]} times" if seen[id] > 1 else "is no question of this benchmark"
            raise UserError(f"{origin}: {name} {clip(id)} {wrong}; nothing is scored")
        if not isinstance(row[text], str):
            raise UserError(f"{origin}: {name} {clip(id)}: its {text} is {clip(repr(row[text]))}, not text")
        answers[places[own]] = row[text]
    missing = [question.id for question, answer in zip(questions, answers) if answer is None]
    if 2 * len(missing) >= len(questions):
        raise UserError(
            f"{file}: answers {len(questions) - len(missing)} of {len(questions)} questions (not {clip(missing[0])}); "
            "nothing is scored with half of them missing"
        )
    return answers
