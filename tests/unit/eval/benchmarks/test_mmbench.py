"""MMBench: rotations, missing options, and the sheet for the server."""

from __future__ import annotations

import re

import pytest

from llava_pdrop.errors import UserError
from llava_pdrop.eval.benchmarks.mmbench import MMBENCH, MMBENCH_CN
from llava_pdrop.eval.benchmarks.prompts import LETTER, LETTER_CN
from llava_pdrop.eval.score import statistics_of
from tests.messages import says
from tests.unit.eval.benchmarks.made import numbers, write_table

HEAD = "index|question|hint|A|B|C|D|answer|category|image|source|l2-category|comment|split"
ROWS = (
    "7|Which?|nan|cat|dog|||A|ocr|@|x|logic_reasoning||dev",
    "8|Which?|Look.|red|None|blue||C|topic|@|x|coarse_perception||dev",
    "1000007|Which?||dog|cat|||B|ocr|@|x|logic_reasoning||dev",
)


@pytest.fixture
def made(tmp_path):
    write_table(tmp_path / "mmbench_dev_20230712.tsv", HEAD, *ROWS)
    write_table(tmp_path / "MMBench_DEV_CN.tsv", HEAD, *ROWS)
    return tmp_path


def test_llavas_words_for_every_model(made) -> None:
    first, second, third = MMBENCH.read(made, False)
    assert first.record.turns[0].text == f"<image>\nWhich?\nA. cat\nB. dog\n{LETTER}"
    assert second.text == f"Look.\nWhich?\nA. red\n{LETTER}"  # its options end where one is missing
    assert second.facts["options"] == {"A": "red", "C": "blue"}  # but the rule knows the rest
    assert third.unit == first.unit == "7" and second.unit == "8"
    assert MMBENCH_CN.read(made, True)[0].text.endswith(f"B. dog\n{LETTER_CN}")
    assert MMBENCH.split_of([first]) == "dev"


def test_the_chinese_table_may_lie_beside_the_english_one(made) -> None:
    for home in (made / "mmbench_cn", made / "mmbench", made):
        write_table(home / "mmbench_dev_cn_20231003.tsv", HEAD, ROWS[0])
    for home in ("mmbench_cn", "mmbench", "."):
        assert MMBENCH_CN.read(made / "mmbench_cn", True)[0].record.origin.startswith(str(made / home / "mmbench_dev"))
        (made / home / "mmbench_dev_cn_20231003.tsv").unlink()


def test_all_rotations_must_be_right(made) -> None:
    questions = MMBENCH.read(made, True)
    found = numbers(MMBENCH, questions, ["A", "C", "A"])
    assert found["circular/Overall"] == 0.5 and found["circular/LR"] == 0 and found["circular/CP"] == 1
    assert found["vanilla_0/Overall"] == 1 and found["vanilla_all/Overall"] == pytest.approx(2 / 3)
    assert found["vanilla_all/ocr"] == 0.5
    assert numbers(MMBENCH, questions, ["A", "C", "cat"])["circular/Overall"] == 1
    assert numbers(MMBENCH, questions, ["A", "C", None])["circular/Overall"] == 0.5


def test_a_rotation_of_index_0_is_among_the_unrotated(made) -> None:
    rows = ["0|?||a|b|||A|ocr|@|x|y||dev", "1000000|?||b|a|||B|ocr|@|x|y||dev"]
    write_table(made / "mmbench_dev_20230712.tsv", HEAD, *rows)
    found = numbers(MMBENCH, MMBENCH.read(made, True), ["A", "A"])
    assert found["circular/Overall"] == 0 and found["vanilla_0/Overall"] == 0.5


def test_the_sheet_of_the_server(made, tmp_path) -> None:
    from openpyxl import load_workbook

    questions = MMBENCH.read(made, True)
    file = MMBENCH.upload(questions, ["=1+1", "A\x0b", None], tmp_path / "out", "own")
    assert file == tmp_path / "out" / "answers_upload" / "mmbench_dev_20230712" / "own.xlsx"
    sheet = load_workbook(file).active
    assert sheet["G2"].data_type == "s"  # no formula
    head, *rows = sheet.iter_rows(values_only=True)
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[0] == (7, "Which?", "cat", "dog", None, None, "=1+1", "A", "dev")
    assert [row[6] for row in rows[1:]] == ["A", None]


def test_rows_without_answers_are_for_the_server(made) -> None:
    rows = [re.sub(r"\|[ABC]\|(ocr|topic)", r"||\1", row) for row in ROWS]
    write_table(made / "mmbench_dev_20230712.tsv", HEAD, *rows)
    assert statistics_of(MMBENCH, MMBENCH.read(made, True), ["A", "C", "B"]) == {}


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("x|?||a|b|||A|ocr|@|x|y||dev", ("index x", "number")),
        ("9|?||a|b|||C|ocr|@|x|y||dev", ("index 9", "answer is C", "A, B")),
        ("7|?||a|b|||A|ocr|@|x|y||dev", ("index 7", "2 times")),
        ("9|?||a|b||||ocr|@|x|y||dev", ("index 9", "no answer", "1 of 4")),
        ("9|||a|b|||A|ocr|@|x|y||dev", ("index 9", "no question")),
        ("2000009|?||a|b|||A|ocr|@|x|y||dev", ("index 2000009", "rotation of 9")),
    ],
)
def test_rows_that_do_not_fit(made, row, parts) -> None:
    write_table(made / "mmbench_dev_20230712.tsv", HEAD, *ROWS, row)
    with pytest.raises(UserError, match=says("mmbench_dev_20230712.tsv", *parts)):
        MMBENCH.read(made, True)
    write_table(made / "mmbench_dev_20230712.tsv", HEAD.replace("l2-", "l2_"), *ROWS)
    with pytest.raises(UserError, match=says("'l2-category'")):
        MMBENCH.read(made, True)
