"""Benchmarks in VLMEvalKit's tables: AI2D, MMStar, DocVQA, InfoVQA, ChartQA, OCRVQA."""

from __future__ import annotations

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks import BENCHMARKS
from llava_pdrop.eval.benchmarks.prompts import LETTER, LETTER_CN
from tests.messages import says
from tests.unit.eval.benchmarks.made import SHORT, numbers, write_table

CHOICES = "index|image|question|A|B|C|hint|answer|category"


def test_choices_are_put_to_a_llava_in_its_words_and_to_others_in_vlmevalkits(tmp_path) -> None:
    write_table(tmp_path / "MMStar.tsv", CHOICES, "0|@|Which?|x|nan|y|Look.|C|c", "1|0|\u54ea\u4e2a?|x|y||None|A|d")
    row = BENCHMARKS["mmstar"]
    first, second = row.read(tmp_path, True)
    assert first.text == f"Look.\nWhich?\nA. x\nC. y\n{LETTER}"
    assert second.text.endswith(f"?\nA. x\nB. y\n{LETTER_CN}")
    assert row.read(tmp_path, False)[0].record.turns[0].text == (
        "<image>\nHint: Look.\nQuestion: Which?\nOptions:\nA. x\nC. y\n"
        "Please select the correct answer from the options above. \n"
    )
    assert numbers(row, [first, second], ["C", "B"]) == {"Overall": 0.5, "c": 1, "d": 0}


@pytest.mark.parametrize("cell", ["B", "", "a"])
def test_the_answer_is_one_of_the_options(tmp_path, cell) -> None:
    write_table(tmp_path / "AI2D_TEST.tsv", CHOICES, f"3|@|Which?|x||y||{cell}|c")
    with pytest.raises(UserError, match=says("AI2D_TEST.tsv", "index 3", "A, C")):
        BENCHMARKS["ai2d"].read(tmp_path, True)


@pytest.mark.parametrize(
    ("answer", "vlmevalkit", "lmms"),
    [("C", 1, 1), ("c", 0, 1), ('"C"', 0, 1), (" C. foo", 1, 1), ("(C) y", 1, 0), ("The answer is C.", 1, 0),
     ("C)", 1, 1), ("y", 1, 0), ("", 0, 0)],
)  # fmt: skip
def test_ai2d(tmp_path, answer, vlmevalkit, lmms) -> None:
    write_table(tmp_path / "AI2D_TEST.tsv", CHOICES, "3|@|Which?|x||y||C|c")
    row = BENCHMARKS["ai2d"]
    question = row.read(tmp_path, True)[0]
    assert [rule.grade(question, answer).value for rule in (row, row.also["lmms_eval"])] == [vlmevalkit, lmms]


@pytest.mark.parametrize(("name", "table"), [("docvqa", "DocVQA_VAL"), ("infovqa", "InfoVQA_VAL")])
def test_anls(tmp_path, name, table) -> None:
    write_table(tmp_path / f"{table}.tsv", "index|image|question|answer", "1|@|What?|['n/a', 'nan']", "2|1|Who?|Bob")
    row = BENCHMARKS[name]
    questions = row.read(tmp_path, True)
    assert [question.text for question in questions] == [f"What?{SHORT}", f"Who?{SHORT}"]
    assert numbers(row, questions, ["", " bob "])["Overall"] == pytest.approx(50 * (1 + 1))
    assert numbers(row, questions, ["", "  bbb  "])["Overall"] == pytest.approx(50 * (1 + 1 - 1 / 7))
    assert numbers(row.also["lmms_eval"], questions, ["", "  bbb  "])["anls"] == pytest.approx((1 - 1 / 3) / 2)
    assert numbers(row, questions, [None, None])["Overall"] == 0


def test_chartqa(tmp_path) -> None:
    rows = [
        "0|@|?|[2009, 2012]|test_human",
        "1|0|?|14%|test_augmented",
        "2|0|?|None|test_human",
        "3|0|?|Yes|test_human",
    ]
    write_table(tmp_path / "ChartQA_TEST.tsv", "index|image|question|answer|split", *rows)
    row = BENCHMARKS["chartqa"]
    questions = row.read(tmp_path, True)
    found = numbers(row, questions, ["2012", "0.14 ", "None", "yes\n"])
    assert found == {"Overall": 75, "test_human": pytest.approx(200 / 3), "test_augmented": 100}
    assert row.grade(questions[0], "[2009, 2012]").value == 0
    others = numbers(row.also["lmms_eval"], questions, ["[2009, 2012]", "14", "None", "yes\n"])
    assert others == {
        "relaxed_overall": 0.5,
        "relaxed_human_split": pytest.approx(2 / 3),
        "relaxed_augmented_split": 0,
    }
    assert row.split_of(questions) == "test"


def test_ocrvqa(tmp_path) -> None:
    rows = ["0|@|?|None", "1|0|?|The Book", "2|0|?|['A', 'B']"]
    write_table(tmp_path.parent / "OCRVQA_TEST.tsv", "index|image|question|answer", *rows)
    row = BENCHMARKS["ocrvqa"]
    questions = row.read(tmp_path, True)
    assert numbers(row, questions, ["", " the book\n", "b"])["Overall"] == 100
    assert numbers(row, questions, ["none", "The Book.", "['A', 'B']"])["Overall"] == 0
    assert row.split_of(questions) == "test"
    write_table(tmp_path / "OCRVQA_TESTCORE.tsv", "index|image|question|answer", *rows)
    assert row.split_of(row.read(tmp_path, True)) == "testcore"
