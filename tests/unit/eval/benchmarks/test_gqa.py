"""GQA: full stops at the end go, blanks stay."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.gqa import GQA
from tests.messages import says
from tests.unit.eval.benchmarks.made import ask_of, numbers, write_json, write_lines


@pytest.fixture
def made(tmp_path):
    write_lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", [ask_of("7", "a.jpg", "What?")])
    write_json(tmp_path / "data" / "testdev_balanced_questions.json", {"7": {"answer": "t-shirt"}})
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "llava", "lmms", "vlmevalkit"),
    [("T-shirt", 1, 1, 1), ("t-shirt..", 1, 1, 0), ("t-shirt .", 0, 0, 0), ("t-shirt\n", 0, 1, 1), ("tshirt", 0, 1, 0),
     ("t-shirt!", 0, 1, 0), ("a t-shirt", 0, 0, 0), ("", 0, 0, 0)],
)  # fmt: skip
def test_three_rules(made, answer, llava, lmms, vlmevalkit) -> None:
    question = GQA.read(made, True)[0]
    rules = (GQA, GQA.also["lmms_eval"], GQA.also["vlmevalkit"])
    assert [rule.grade(question, answer).value for rule in rules] == [llava, lmms, vlmevalkit]
    assert numbers(GQA, [question], [answer]) == {"accuracy": 100 * llava}


def test_the_file_that_gqas_code_takes(made) -> None:
    questions = GQA.read(made, True)
    file = GQA.upload(questions, ["A T-Shirt.. "], made / "out", "own")
    assert file.name == "testdev_balanced_predictions.json"
    assert json.loads(file.read_text(encoding="utf-8")) == [{"questionId": "7", "prediction": "a t-shirt.. "}]


def test_files_that_do_not_fit(made) -> None:
    write_lines(made / "llava_gqa_testdev_balanced.jsonl", [ask_of("9", "a.jpg", "What?")])
    with pytest.raises(UserError, match=says("question_id 9", "testdev_balanced_questions.json")):
        GQA.read(made, True)
    write_json(made / "data" / "testdev_balanced_questions.json", {"9": {}})
    with pytest.raises(UserError, match=says("testdev_balanced_questions.json", "9", "'answer'")):
        GQA.read(made, True)
