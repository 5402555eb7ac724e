"""VQAv2: which split lies there, what the server makes of the upload, and what the upload holds."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.errors import MissingFileError, UserError
from llava_pdrop.eval.benchmarks.vqav2 import TEST, VAL, VAL_LABELS, VQAV2, WHOLE_TEST
from llava_pdrop.eval.rules.grades import known
from llava_pdrop.eval.score import statistics_of
from tests.messages import says
from tests.unit.eval.benchmarks.made import SHORT, ask_of, numbers, write_json, write_lines


def label(id: int, *answers: str, kind: str = "what is", type: str = "other") -> dict:
    given = [{"answer": answer, "answer_id": place} for place, answer in enumerate(answers)]
    return {"question_id": id, "answers": given, "question_type": kind, "answer_type": type}


LABELS = [label(2, *["two"] * 4, *["x"] * 6), label(1, *["yes"] * 10, kind="is the", type="yes/no")]


@pytest.fixture
def test_dev(tmp_path):
    rows = [ask_of(1, "a.jpg", "Is it?"), ask_of(2, "b.jpg", "What?")]
    write_lines(tmp_path / f"{TEST}.jsonl", rows)
    write_lines(tmp_path / WHOLE_TEST, [ask_of(9, "c.jpg", "Other?"), *reversed(rows)])
    return tmp_path


def test_test_dev_with_answers(test_dev) -> None:
    write_json(test_dev / "annotations.json", {"annotations": LABELS})
    questions = VQAV2.read(test_dev, True)
    assert VQAV2.split_of(questions) == VQAV2.paper_split
    assert questions[0].record.images == (test_dev / "test2015" / "a.jpg",)
    assert numbers(VQAV2, questions, ["Yes.", "2"]) == {
        "overall": 100,
        "perQuestionType/is the": 100,
        "perQuestionType/what is": 100,
        "perAnswerType/yes/no": 100,
        "perAnswerType/other": 100,
    }
    assert numbers(VQAV2.also["vqa_official"], questions, ["Yes.", "2"])["overall"] == 50
    assert numbers(VQAV2.also["lmms_eval"], questions, ["Yes.", "2"]) == {"exact_match": 1}
    assert numbers(VQAV2, questions, [None, "x"])["overall"] == 50


def test_val_where_the_tests_answers_are_not_there(test_dev) -> None:
    rows = [{"question_id": 10, "image_id": 42, "question": "What?"}]
    write_json(test_dev / VAL, {"questions": rows})
    assert VQAV2.split_of(VQAV2.read(test_dev, True)) == "test-dev"  # no pictures of val
    (test_dev / "val2014").mkdir()
    with pytest.raises(MissingFileError, match=says(VAL_LABELS)):
        VQAV2.read(test_dev, True)
    write_json(test_dev / VAL_LABELS, {"annotations": [label(10, *["a"] * 10)]})
    questions = VQAV2.read(test_dev, True)
    assert questions[0].text == f"What?{SHORT}"
    assert questions[0].record.images == (test_dev / "val2014" / "COCO_val2014_000000000042.jpg",)
    assert VQAV2.split_of(questions) == "val" != VQAV2.paper_split
    file = VQAV2.upload(questions, ["A cat"], test_dev / "out", "own")
    assert json.loads(file.read_text(encoding="utf-8")) == [{"question_id": 10, "answer": "cat"}]


def test_what_only_the_server_knows(test_dev) -> None:
    questions = VQAV2.read(test_dev, True)
    assert not known(questions) and VQAV2.split_of(questions) == VQAV2.paper_split
    assert statistics_of(VQAV2, questions, ["yes", "two"]) == {}
    file = VQAV2.upload(questions, ["Yes.", None], test_dev / "out", "own")
    assert file == test_dev / "out" / "answers_upload" / TEST / "own.json"
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"question_id": 9, "answer": ""},
        {"question_id": 2, "answer": ""},
        {"question_id": 1, "answer": "yes"},
    ]
    (test_dev / WHOLE_TEST).unlink()
    with pytest.raises(MissingFileError, match=says(WHOLE_TEST, "server", "llava-pdrop benchmarks")):
        VQAV2.read(test_dev, True)


def test_files_that_do_not_fit(test_dev) -> None:
    for labels, parts in (
        (LABELS[:1], ("question_id 1", f"{TEST}.jsonl")),
        ([*LABELS, LABELS[0]], ("annotations.json", "question_id 2", "2 times")),
        ([{"question_id": 1}], ("annotations.json", "annotations[0]", "'answers'")),
    ):
        write_json(test_dev / "annotations.json", {"annotations": labels})
        with pytest.raises(UserError, match=says(*parts)):
            VQAV2.read(test_dev, True)
    (test_dev / "annotations.json").unlink()
    write_lines(test_dev / WHOLE_TEST, [ask_of(1, "a.jpg", "Is it?")])
    with pytest.raises(UserError, match=says(f"{TEST}.jsonl", "question_id 2", WHOLE_TEST)):
        VQAV2.read(test_dev, True)
    write_lines(test_dev / WHOLE_TEST, [ask_of("one", "a.jpg", "Is it?")])
    with pytest.raises(UserError, match=says(WHOLE_TEST, "question_id", "'one'", "a whole number")):
        VQAV2.read(test_dev, True)
