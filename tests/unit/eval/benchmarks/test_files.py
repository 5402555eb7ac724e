"""Files of questions and answers: what is wrong with them is one line."""

from __future__ import annotations

import codecs
import gzip

import pytest

from llava_pdrop.errors import MissingFileError, UserError
from llava_pdrop.eval.benchmarks.files import (
    answers_of,
    cell,
    find_table,
    numbered,
    pictures_of_table,
    read_answers,
    read_json,
    read_lines,
    read_table,
    with_keys,
)
from llava_pdrop.eval.questions import ask
from tests.messages import says
from tests.unit.eval.benchmarks.made import PICTURE, write_lines, write_table


def test_missing_and_broken_files(tmp_path) -> None:
    for reading in (read_json, lambda file: read_lines(file, ()), lambda file: read_table(file, ())):
        with pytest.raises(MissingFileError, match=says("none.json", "llava-pdrop benchmarks")):
            reading(tmp_path / "none.json")
    (tmp_path / "x.jsonl").write_text('{"a": "1"}\nnot\n', encoding="utf-8")
    with pytest.raises(UserError, match=says("x.jsonl:2", "JSON")):
        read_lines(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(UserError, match=says("x.jsonl:1", "'b'", "'a'")):
        read_lines(write_lines(tmp_path / "x.jsonl", [{"a": "1"}]), ["a", "b"])
    with pytest.raises(UserError, match=says("x.jsonl:1", "list")):
        read_lines(write_lines(tmp_path / "x.jsonl", [[1]]), ["a"])
    with pytest.raises(UserError, match=says("x.jsonl", "no questions")):
        read_lines(write_lines(tmp_path / "x.jsonl", []), ["a"])


def test_files_of_another_encoding(tmp_path) -> None:
    file = tmp_path / "x.tsv"
    for reading in (read_json, lambda file: read_lines(file, ()), lambda file: read_table(file, ())):
        for content in ("café".encode("latin-1"), gzip.compress(b"index"), "index".encode("utf-16")):
            file.write_bytes(content)
            with pytest.raises(UserError, match=says("x.tsv", "UTF-8", "fetch")):
                reading(file)
    file.write_bytes(codecs.BOM_UTF8 + b'{"a": "x"}')
    assert read_json(file) == {"a": "x"} and read_lines(file, ["a"]) == [{"a": "x"}]
    file.write_bytes(codecs.BOM_UTF8 + b"index\r\n1\r\n")
    assert read_table(file, ()) == [{"index": "1"}]
    file.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(UserError, match=says("x.tsv", "JSON")):
        read_json(file)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": None}, ("text", "None", "text")),
        ({"text": ["a"]}, ("text", "['a']")),
        ({"question_id": True}, ("question_id", "True", "a whole number")),
        ({"question_id": 1.5}, ("question_id", "1.5")),
        ({"answers": "yes"}, ("answers", "'yes'", "a list")),
        ({"answer": "0"}, ("answer", "'0'", "a whole number")),
    ],
)
def test_keys_that_hold_something_else(row, parts) -> None:
    with pytest.raises(UserError, match=says("x.json[3]", *parts)):
        with_keys(row, row, "x.json[3]", answer=(int,))


def test_what_people_answered() -> None:
    assert answers_of({"answers": [{"answer": "yes"}, {"answer": ""}]}, "x") == ["yes", ""]
    for entries, parts in (([], ("empty",)), ([5], ("int",)), ([{"answer": 5}], ("5",))):
        with pytest.raises(UserError, match=says("x[0]", *parts)):
            answers_of({"answers": entries}, "x[0]")


def test_tables(tmp_path) -> None:
    file = write_table(tmp_path / "t.tsv", "index|image|A|B|answer", "1|@|None|x|NA", "2|1|N/A|nan|B")
    assert read_table(file, ["image"], whole=["answer"]) == [
        {"index": "1", "image": PICTURE, "B": "x", "answer": "NA"},
        {"index": "2", "image": "1", "answer": "B"},
    ]
    rows = read_table(file, [])
    first, second = pictures_of_table(rows, file)
    assert first == second
    for lines, parts in (
        (["index|image", "1|@", "1|@"], ("index 1", "2 times")),
        (["index|image", "1|@|x"], ("row 2", "3 cells")),
        (["image|B", "@|x"], ("'index'", "image, B")),
        (["index|image", "|@"], ("row 2", "no index")),
        (["index|image"], ("no questions",)),
        (["index|image|image", "1|@|@"], ("image, image",)),
    ):
        with pytest.raises(UserError, match=says("t.tsv", *parts)):
            read_table(write_table(file, *lines), ["image"])


@pytest.mark.parametrize("cell", ["3", "2", ""])
def test_pictures_of_other_rows_must_be_there(tmp_path, cell) -> None:
    file = write_table(tmp_path / "t.tsv", "index|image", "1|@", f"2|{cell}")
    with pytest.raises(UserError, match=says("t.tsv", "index 2")):
        pictures_of_table(read_table(file, []), file)


def test_tables_lie_in_their_own_directory_or_above(tmp_path) -> None:
    with pytest.raises(MissingFileError, match=says("a.tsv", "b.tsv")):
        find_table(tmp_path / "own", ["a", "b"])
    above = write_table(tmp_path / "b.tsv", "index")
    assert find_table(tmp_path / "own", ["a", "b"]) == above
    own = write_table(tmp_path / "own" / "b.tsv", "index")
    assert find_table(tmp_path / "own", ["a", "b"]) == own


def test_cells_that_are_missing(tmp_path) -> None:
    assert cell({"index": "7", "question": "?"}, "question", tmp_path) == "?"
    with pytest.raises(UserError, match=says("x.tsv", "index 7", "question")):
        cell({"index": "7"}, "question", tmp_path / "x.tsv")


def questions(*ids: str):
    return [ask(id, "?", [], f"q[{id}]", "") for id in numbered(ids)]


def test_answers_in_both_kinds_of_keys(tmp_path) -> None:
    rows = [{"question_id": 2, "text": " b "}, {"question_id": "1", "round_id": 0, "text": "a"}]
    assert read_answers(write_lines(tmp_path / "a.jsonl", rows), questions("1", "2", "3")) == ["a", " b ", None]
    rows = [{"index": 1, "prediction": ""}, {"index": 2, "prediction": "x"}]
    assert read_answers(write_lines(tmp_path / "a.jsonl", rows), questions("1", "2")) == ["", "x"]


def test_answers_to_questions_of_one_name_go_in_order(tmp_path) -> None:
    rows = [{"question_id": id, "text": text} for id, text in (("p", "1"), ("r", "2"), ("p", "3"))]
    assert read_answers(write_lines(tmp_path / "a.jsonl", rows), questions("p", "p", "r")) == ["1", "3", "2"]


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([{"question_id": 9, "text": ""}], ("answer 1", "question_id 9", "no question")),
        ([{"question_id": 1, "text": ""}] * 2, ("answer 2", "question_id 1", "2 times")),
        ([{"question_id": 1, "answer": ""}], ("answer 1", "'text'")),
        ([{"id": 1, "text": ""}], ("answer 1", "'question_id'")),
        ([{"index": 1, "prediction": 5}], ("answer 1", "index 1", "5")),
        ([{"question_id": 1, "text": ""}], ("1 of 2", "2")),
    ],
)
def test_answers_that_do_not_fit(tmp_path, rows, parts) -> None:
    with pytest.raises(UserError, match=says("a.jsonl", *parts)):
        read_answers(write_lines(tmp_path / "a.jsonl", rows), questions("1", "2"))
