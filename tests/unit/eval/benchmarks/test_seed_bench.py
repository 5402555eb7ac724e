"""SEED-Bench: the letter alone, and frames of videos where they are there."""

from __future__ import annotations

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.seed_bench import SEED_BENCH, VIDEO
from tests.messages import says
from tests.unit.eval.benchmarks.made import ask_of, numbers, write_json, write_lines


def label(id: str, answer: str, kind: str = "image", type: int = 1) -> dict:
    choices = {f"choice_{letter}": text for letter, text in zip("abcd", ("cat", "dog", "None", "eel"))}
    return {"question_id": id, "answer": answer, "data_type": kind, "question_type_id": type, **choices}


@pytest.fixture
def made(tmp_path):
    rows = [ask_of(1, "SEED-Bench-image/1", "Q1?"), ask_of(2, "SEED-Bench-image/2", "Q2?")]
    write_lines(tmp_path / "llava-seed-bench.jsonl", [*rows, ask_of("v1_0", f"{VIDEO}/1_0.png", "Q3?")])
    labels = [label("v1_0", "C", "video", 10), label("2", "B", type=2), label("1", "A")]
    types = {"Scene": 1, "Place": 2, "Action": 10}
    write_json(tmp_path / "SEED-Bench.json", {"questions": labels, "question_type": types})
    return tmp_path


def test_videos_are_asked_where_their_frames_are(made) -> None:
    assert [question.id for question in SEED_BENCH.read(made, True)] == ["1", "2"]
    assert numbers(SEED_BENCH, SEED_BENCH.read(made, True), ["A", "B"])["image"] == 100
    (made / VIDEO).mkdir()
    questions = SEED_BENCH.read(made, True)
    assert [question.gold for question in questions] == ["A", "B", "C"]
    found = numbers(SEED_BENCH, questions, ["A", "A", "C"])
    assert found["image"] == 50 and found["video"] == 100 and found["total"] == pytest.approx(200 / 3)
    assert found["Scene"] == 100 and found["Place"] == 0 and found["Action"] == 100
    assert questions[0].facts["question_id"] == 1


@pytest.mark.parametrize(
    ("answer", "llava", "lmms", "vlmevalkit"),
    [("A", 1, 1, 1), ("A.", 0, 1, 1), ("a", 0, 1, 0), (" A", 0, 1, 1), ("(A)", 0, 0, 1), ("A dog", 0, 1, 1),
     ("Apple", 0, 1, 0), ("cat", 0, 0, 1), ("", 0, 0, 0), ("B", 0, 0, 0)],
)  # fmt: skip
def test_three_rules(made, answer, llava, lmms, vlmevalkit) -> None:
    question = SEED_BENCH.read(made, True)[0]
    rules = (SEED_BENCH, SEED_BENCH.also["lmms_eval"], SEED_BENCH.also["vlmevalkit"])
    assert [rule.grade(question, answer).value for rule in rules] == [llava, lmms, vlmevalkit]


def test_files_that_do_not_fit(made) -> None:
    write_lines(made / "llava-seed-bench.jsonl", [ask_of(5, "SEED-Bench-image/5", "?")])
    with pytest.raises(UserError, match=says("question_id 5", "SEED-Bench.json")):
        SEED_BENCH.read(made, True)
    write_lines(made / "llava-seed-bench.jsonl", [ask_of(1, "SEED-Bench-image/1", "?")])
    for labels, parts in (
        ([label("1", "A", type=9)], ("question_id 1", "type 9")),
        ([label("1", "A"), label("1", "B")], ("question_id 1", "2 times")),
        ([label("1", "a")], ("question_id 1", "answer", "a", "A, B, C, D")),
        ([label("1", "A", "film")], ("question_id 1", "data_type", "film")),
        ([label("1", "A"), label("2", "A")], ("1 questions", "of 2")),
        ([{"question_id": "1"}], ("questions[0]", "'answer'")),
    ):
        write_json(made / "SEED-Bench.json", {"questions": labels, "question_type": {"Scene": 1}})
        with pytest.raises(UserError, match=says("SEED-Bench.json", *parts)):
            SEED_BENCH.read(made, True)
