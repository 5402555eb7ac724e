"""ScienceQA: how a letter must stand, and what is among the pictures."""

from __future__ import annotations

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.prompts import LETTER
from llava_pdrop.eval.benchmarks.scienceqa import SCIENCEQA, parsed
from tests.messages import says
from tests.unit.eval.benchmarks.made import numbers, write_json


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), ("B. ", "B"), ("B. cat", "B"), ("B.", "FAILED"), ("b", "FAILED"), (" B", "FAILED"), ("F", "FAILED"),
     ("F. cat", "FAILED"), ("AB", "FAILED"), ("", "FAILED"), ("The answer is B.", "B"), ("The answer is Bx", "B"),
     ("The answer is B", "FAILED"), ("The answer is B\n", "FAILED"), ("The answer is Q.", "Q"),
     ("The answer is B. The answer is B.", "FAILED"), ("the answer is B.", "FAILED"), ("A. The answer is B.", "A")],
)  # fmt: skip
def test_the_letter_that_llava_reads(answer, letter) -> None:
    assert parsed(answer) == letter


def row(id: str, text: str, image: str | None = None) -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}]
    return {"id": id, "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def made(tmp_path):
    rows = [row("4", "What?\nA. x\nB. y"), row("7", "Which?\nA. x\nB. y\n<image>", "7/image.png")]
    write_json(tmp_path / "llava_test_CQM-A.json", rows)
    write_json(tmp_path / "pid_splits.json", {"test": ["7", "4"], "train": ["1"]})
    problem = {"choices": ["x", "y"], "answer": 1, "subject": "history"}
    write_json(tmp_path / "problems.json", {"4": problem, "7": problem, "1": problem})
    return tmp_path


def test_questions_with_and_without_pictures(made) -> None:
    first, second = SCIENCEQA.read(made, True)
    assert first.record.turns[0].text == f"What?\nA. x\nB. y\n{LETTER}"
    assert second.record.turns[0].text == f"<image>\nWhich?\nA. x\nB. y\n{LETTER}"
    assert second.record.images == (made / "images" / "test" / "7/image.png",)
    assert first.gold == "B"


def test_what_was_never_answered_leaves_the_pictures(made) -> None:
    questions = SCIENCEQA.read(made, True)
    assert numbers(SCIENCEQA, questions, ["B", ""]) == {"accuracy": 50, "img_accuracy": 0}
    assert numbers(SCIENCEQA, questions, ["A", "B. y"]) == {"accuracy": 50, "img_accuracy": 100}
    assert numbers(SCIENCEQA, questions, ["B", None]) == {"accuracy": 50}
    assert numbers(SCIENCEQA.also["lmms_eval"], questions, ["A", "b"]) == {"exact_match": 1}
    assert numbers(SCIENCEQA.also["vlmevalkit"], questions, ["A", "(B)"]) == {"Overall": 1, "history": 1}


def test_a_letter_beyond_the_choices_is_wrong(made) -> None:
    assert SCIENCEQA.grade(SCIENCEQA.read(made, True)[0], "E").value == 0


def test_files_that_do_not_fit(made) -> None:
    write_json(made / "pid_splits.json", {"test": ["4", "7", "9"]})
    with pytest.raises(UserError, match=says("llava_test_CQM-A.json", "question 9", "pid_splits.json")):
        SCIENCEQA.read(made, True)
    write_json(made / "pid_splits.json", {"test": ["4", "7"]})
    write_json(made / "problems.json", {"4": {"choices": ["x"], "answer": 1, "subject": "s"}})
    with pytest.raises(UserError, match=says("problems.json", "4", "answer 1")):
        SCIENCEQA.read(made, True)
    write_json(made / "problems.json", {})
    with pytest.raises(UserError, match=says("problems.json", "4")):
        SCIENCEQA.read(made, True)
    write_json(made / "llava_test_CQM-A.json", {})
    with pytest.raises(UserError, match=says("llava_test_CQM-A.json", "list")):
        SCIENCEQA.read(made, True)
