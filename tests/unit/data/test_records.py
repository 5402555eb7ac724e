"""Data files -> records: both formats, and one clear line for every kind of bad input."""

from __future__ import annotations

import json

import pytest

from llava_pdrop.data.records import read_records
from llava_pdrop.types import Turn

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A cat."}
ENTRY = {"id": "a", "image": "picture.png", "conversations": [ASK, ANSWER]}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_json_and_jsonl_give_the_same_records(tmp_path, picture):
    image = picture()
    entries = [
        ENTRY,
        {"id": 7, "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]},
        {
            "image": ["picture.png", "picture.png"],
            "conversations": [{"from": "human", "value": "<image><image>"}, ANSWER],
        },
    ]
    records = read_records(write(tmp_path / "d.json", entries))
    lines = read_records(write(tmp_path / "d.jsonl", "\n\n".join(map(json.dumps, entries))), image_root=tmp_path)

    assert [r.images for r in records] == [(image,), (), (image, image)]
    assert records[0].turns == (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cat."))
    assert [r.turns for r in records] == [r.turns for r in lines]
    assert [r.id for r in records[:2]] == ["a", "7"]
    assert records[1].origin.endswith("d.json[1]") and lines[1].origin.endswith("d.jsonl:3")
    assert records[2].id == records[2].origin  # an entry without an id


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**ENTRY, "conversations": []}, "at least one turn"),
        ({"id": "a"}, "at least one turn"),
        ("text", "expected an object"),
        (
            {**ENTRY, "conversations": [{"from": "robot", "value": "x"}]},
            "unknown speaker 'robot'; known are human, user",
        ),
        ({**ENTRY, "conversations": [{"from": ["human"], "value": "x"}]}, "unknown speaker"),
        ({**ENTRY, "conversations": [{"from": "human"}]}, "needs 'from' and a text 'value'"),
        ({**ENTRY, "conversations": [{"from": "human", "value": 3}]}, "needs 'from' and a text 'value'"),
        ({**ENTRY, "image": 3}, "'image' must be a file name"),
        ({**ENTRY, "image": ["picture.png", ""]}, "'image' must be a file name"),
        ({**ENTRY, "image": None}, r"0 image\(s\) but 1 <image> marker"),
        ({**ENTRY, "image": ["picture.png"] * 2}, r"2 image\(s\) but 1 <image> marker"),
        ({**ENTRY, "conversations": [ANSWER]}, r"1 image\(s\) but 0 <image> marker"),
    ],
)
def test_bad_entries_are_named(tmp_path, picture, entry, message):
    picture()
    path = write(tmp_path / "d.json", [ENTRY, entry])
    with pytest.raises(ValueError, match=message) as error:
        read_records(path)
    assert f"{path}[1]" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", "[{", "not valid JSON"),
        ("d.json", "{}", "expected a JSON list"),
        ("d.json", "[]", "no records"),
        ("d.jsonl", '{"id": 1', r"d.jsonl:1: not valid JSON"),
        ("d.csv", "a,b", r"unknown data format '.csv'; known are llava_json \(\*.json\), jsonl"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path / name, content))


def test_missing_files(tmp_path):
    path = write(tmp_path / "d.json", [ENTRY])
    with pytest.raises(FileNotFoundError, match=r"id a\): image .*picture.png does not exist"):
        read_records(path)
    assert len(read_records(path, check_images=False)) == 1
    with pytest.raises(FileNotFoundError, match="no such data file"):
        read_records(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="no such image folder"):
        read_records(path, image_root=tmp_path / "none")


def test_a_format_can_be_named(tmp_path, picture):
    picture()
    assert len(read_records(write(tmp_path / "d.txt", json.dumps(ENTRY)), format="jsonl")) == 1
