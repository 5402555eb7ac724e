"""VizWiz: test with answers, else val, else the server."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.vizwiz import UNANSWERABLE, VIZWIZ
from llava_pdrop.eval.rules.grades import known
from llava_pdrop.eval.score import statistics_of
from tests.messages import says
from tests.unit.eval.benchmarks.made import SHORT, ask_of, numbers, write_json, write_lines


def label(image: str, *answers: str) -> dict:
    return {"image": image, "question": "What?", "answers": [{"answer": answer} for answer in answers]}


@pytest.fixture
def made(tmp_path):
    rows = [ask_of(0, "a.jpg", f"What?\n{UNANSWERABLE}"), ask_of(1, "b.jpg", f"Who?\n{UNANSWERABLE}")]
    write_lines(tmp_path / "llava_test.jsonl", rows)
    return tmp_path


def test_test_with_answers(made) -> None:
    write_json(made / "test.json", [label("b.jpg", *["lorn's"] * 10), label("a.jpg", *["5"] * 2, *["x"] * 8)])
    questions = VIZWIZ.read(made, True)
    assert VIZWIZ.split_of(questions) == VIZWIZ.paper_split
    assert numbers(VIZWIZ, questions, ["five", "Lorn's."]) == {"exact_match": pytest.approx(0.8)}
    assert numbers(VIZWIZ.also["vlmevalkit"], questions, ["5.", "lorn's"]) == {"Overall": 50}
    assert questions[0].record.images == (made / "test" / "a.jpg",)


def test_val_where_the_tests_answers_are_not_there(made) -> None:
    write_json(made / "test.json", [{"image": "a.jpg", "question": "What?"}])
    assert not known(VIZWIZ.read(made, True))
    write_json(made / "val.json", [label("v.jpg", *["yes"] * 10)])
    assert VIZWIZ.split_of(VIZWIZ.read(made, True)) == "test"  # the archive of annotations has both
    (made / "val").mkdir()
    questions = VIZWIZ.read(made, True)
    assert questions[0].text == f"What?\n{UNANSWERABLE}{SHORT}"
    assert questions[0].record.images == (made / "val" / "v.jpg",)
    assert VIZWIZ.split_of(questions) == "val" != VIZWIZ.paper_split


def test_the_file_of_the_server(made) -> None:
    questions = VIZWIZ.read(made, True)
    assert statistics_of(VIZWIZ, questions, ["yes", "no"]) == {}
    file = VIZWIZ.upload(questions, ["A Cat.", ""], made / "out", "own")
    assert file == made / "out" / "answers_upload" / "own.json"
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {"image": "a.jpg", "answer": "cat"},
        {"image": "b.jpg", "answer": ""},
    ]
    with pytest.raises(UserError, match=says("question 1", "no answer", "server")):
        VIZWIZ.upload(questions, ["x", None], made / "out", "own")


def test_files_that_do_not_fit(made) -> None:
    for labels, parts in (
        ([label("a.jpg", "x")], ("llava_test.jsonl", "question_id 1", "b.jpg")),
        ([label("a.jpg", "x"), label("a.jpg", "x")], ("test.json", "image a.jpg", "2 times")),
        ([{"image": "a.jpg"}], ("test.json[0]", "'question'")),
        ({}, ("test.json", "list")),
    ):
        write_json(made / "test.json", labels)
        with pytest.raises(UserError, match=says(*parts)):
            VIZWIZ.read(made, True)
