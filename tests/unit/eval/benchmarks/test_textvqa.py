"""TextVQA: joined by picture and question, as LLaVA's script does."""

from __future__ import annotations

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.textvqa import TEXTVQA, asked
from tests.messages import says
from tests.unit.eval.benchmarks.made import SHORT, numbers, write_json, write_lines


def row(picture: str, question: str, tokens: str | None = "") -> dict:
    ocr = "" if tokens is None else f"\nReference OCR token: {tokens}"
    return {"question_id": picture, "image": f"{picture}.jpg", "text": question + ocr + SHORT}


def label(picture: str, question: str, *answers: str) -> dict:
    return {"image_id": picture, "question": question, "answers": [*answers, *["x"] * (10 - len(answers))]}


@pytest.fixture
def made(tmp_path):
    write_lines(
        tmp_path / "llava_textvqa_val_v051_ocr.jsonl",
        [row("p", "What is it?"), row("p", "Where is it?", "EXIT, 5"), row("q", "Why?", None), row("q", "WHY?", "a")],
    )
    labels = [label("q", "why?", *["one"] * 6), label("p", "where is IT?", *["b"] * 3), label("p", "What is it?", "c"),
              label("q", "Why?", *["two"] * 6)]  # fmt: skip
    write_json(tmp_path / "TextVQA_0.5.1_val.json", {"data": labels})
    return tmp_path


def test_the_last_annotation_of_a_question_wins(made) -> None:
    questions = TEXTVQA.read(made, True)
    assert [question.id for question in questions] == ["p", "p#2", "q", "q#2"]
    assert questions[0].facts["question_id"] == questions[1].facts["question_id"] == "p"
    assert questions[1].text == f"Where is it?\nReference OCR token: EXIT, 5{SHORT}"
    assert numbers(TEXTVQA, questions, ["c", "B.", "two", "two"])["accuracy"] == pytest.approx(
        100 * (0.3 + 0.9 + 1 + 1) / 4
    )
    others = numbers(TEXTVQA.also["lmms_eval"], questions, ["c", "b", "one", "two"])
    assert others["exact_match"] == pytest.approx((0.3 + 0.9 + 1 + 1) / 4)
    assert questions[2].record.images == (made / "train_images" / "q.jpg",)


def test_the_question_within_the_prompt() -> None:
    assert asked(f"What?\nReference OCR token: \n{SHORT.strip()}", "f") == "What?"
    assert asked(f"Reference OCR token: a\nWhat?\n{SHORT.strip()}", "f") == "What?"
    assert asked(f"What?{SHORT}", "f") == "What?"


@pytest.mark.parametrize("text", ["What?\nReference OCR token: a\nb\nAnswer.", "What?", "What?\nx\ny"])
def test_a_prompt_of_other_lines_stops(made, text) -> None:
    lines = [{"question_id": "p", "image": "p.jpg", "text": text}]
    write_lines(made / "llava_textvqa_val_v051_ocr.jsonl", lines)
    with pytest.raises(UserError, match=says("llava_textvqa_val_v051_ocr.jsonl", "question_id p", "lines")):
        TEXTVQA.read(made, True)


def test_files_that_do_not_fit(made) -> None:
    write_lines(made / "llava_textvqa_val_v051_ocr.jsonl", [row("p", "Who?")])
    with pytest.raises(UserError, match=says("question_id p", "'who?'", "TextVQA_0.5.1_val.json")):
        TEXTVQA.read(made, True)
    write_json(made / "TextVQA_0.5.1_val.json", {"data": [{**label("p", "Who?"), "answers": ["x"] * 9}]})
    with pytest.raises(UserError, match=says("data[0]", "9 answers")):
        TEXTVQA.read(made, True)
    write_json(made / "TextVQA_0.5.1_val.json", {"data": [{**label("p", "Who?"), "answers": [5] * 10}]})
    with pytest.raises(UserError, match=says("data[0]", "5", "text")):
        TEXTVQA.read(made, True)
    write_json(made / "TextVQA_0.5.1_val.json", {"data": [label("p", "Who?"), label("r", "Who?")]})
    with pytest.raises(UserError, match=says("1 questions", "TextVQA_0.5.1_val.json", "of 2")):
        TEXTVQA.read(made, True)
