"""MME: four characters, pairs, and labels behind one blank or two."""

from __future__ import annotations

import pytest

from llava_pdrop.errors import MissingFileError, UserError
from llava_pdrop.eval.benchmarks.mme import MME, RELEASE
from tests.messages import says
from tests.unit.eval.benchmarks.made import ask_of, numbers, write_lines

LINES = {
    "OCR/1": "Is it red? Please answer yes or no.\tYes\nIs it blue?  Please answer yes or no.\tNo\n",
    "artwork/2": "Is it old? Please answer yes or no.\tYes\nIs it new? Please answer yes or no.\tNo\n",
    "code_reasoning/3": "Is it 1? Please answer yes or no.\tYes\nIs it 2? Please answer yes or no.\tNo\n",
}
ROWS = [
    ask_of("OCR/1.jpg", "OCR/1.jpg", "Is it red?"),
    ask_of("OCR/1.jpg", "OCR/1.jpg", "Is it blue?"),
    ask_of("artwork/images/2.jpg", "artwork/images/2.jpg", "Is it old?"),
    ask_of("artwork/images/2.jpg", "artwork/images/2.jpg", "Is it new?"),
    ask_of("code_reasoning/3.png", "code_reasoning/3.png", "Is it 1?"),
    ask_of("code_reasoning/3.png", "code_reasoning/3.png", "Is it 2?"),
]


@pytest.fixture
def made(tmp_path):
    write_lines(tmp_path / "llava_mme.jsonl", ROWS)
    (tmp_path / RELEASE / "artwork" / "images").mkdir(parents=True)
    for name, text in LINES.items():
        name = name.replace("/", "/questions_answers_YN/") if name.startswith("artwork") else name
        file = tmp_path / RELEASE / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path


def test_questions_of_a_picture_belong_together(made) -> None:
    questions = MME.read(made, True)
    assert [question.gold for question in questions] == ["Yes", "No"] * 3
    assert [question.unit for question in questions][::2] == ["OCR/1", "artwork/2", "code_reasoning/3"]
    assert questions[1].id == "OCR/1.jpg#2" and questions[1].facts["question_id"] == "OCR/1.jpg"
    assert questions[0].record.images == (made / RELEASE / "OCR/1.jpg",)
    assert "yes or no" not in questions[0].text


def test_points(made) -> None:
    questions = MME.read(made, True)
    found = numbers(MME, questions, ["yes", "no", "yes", "yes", "Unknown", "no"])
    assert found["categories/OCR/score"] == 200
    assert found["categories/artwork/acc"] == 50 and found["categories/artwork/acc_plus"] == 0
    assert found["perception"] == 250 and found["cognition"] == 50
    assert numbers(MME, questions, [None] * 6)["perception"] == 0
    other = numbers(MME.also["vlmevalkit"], questions, ["The answer is yes.", "no", "no", "no", "yes", "no"])
    assert other["OCR"] == 200 and other["perception"] == 250 and other["reasoning"] == 200


def test_files_that_do_not_fit(made) -> None:
    for rows, parts in (
        ([ask_of("x/1.jpg", "x/1.jpg", "?")], ("x/1.jpg", "category x")),
        ([*ROWS, ask_of("OCR/1.jpg", "OCR/1.jpg", "Is it red?")], ("OCR/1", "3 questions")),
        ([ask_of("OCR/1.jpg", "OCR/1.jpg", "Is it pink?")], ("OCR/1.jpg", "1.txt", "Is it pink?")),
    ):
        write_lines(made / "llava_mme.jsonl", rows)
        with pytest.raises(UserError, match=says(*parts)):
            MME.read(made, True)
    write_lines(made / "llava_mme.jsonl", ROWS)
    (made / RELEASE / "OCR" / "1.txt").write_text("Is it red? Yes\n", encoding="utf-8")
    with pytest.raises(UserError, match=says("1.txt", "tab")):
        MME.read(made, True)
    (made / RELEASE / "OCR" / "1.txt").write_bytes("Is it caf\u00e9?\tYes\n".encode("latin-1"))
    with pytest.raises(UserError, match=says("1.txt", "UTF-8")):
        MME.read(made, True)
    (made / RELEASE / "OCR" / "1.txt").unlink()
    with pytest.raises(MissingFileError, match=says("1.txt", "llava-pdrop benchmarks")):
        MME.read(made, True)
