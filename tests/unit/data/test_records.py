"""Data files -> records: text formats, lazy decoding, and one clear line for every kind of bad input."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from llava_pdrop.data.readers import READERS, text
from llava_pdrop.data.records import Records, read_records
from llava_pdrop.errors import RecordError
from llava_pdrop.types import Turn
from tests.messages import says

ASK = {"from": "human", "value": "<image>\nWhat is it?"}
TEXT_ONLY = {"from": "human", "value": "What is it?"}
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
        ({**ENTRY, "conversations": []}, says("at least one turn")),
        ({"id": "a"}, says("'conversations'", "'messages'", "id")),
        ("text", says("object")),
        (
            {**ENTRY, "conversations": [{"from": "robot", "value": "x"}]},
            says("'robot'", "human", "user"),
        ),
        ({**ENTRY, "conversations": [{"from": ["human"], "value": "x"}]}, says("speaker", "['human']")),
        ({**ENTRY, "conversations": [{"from": "human"}]}, says("'from'", "text 'value'")),
        ({**ENTRY, "conversations": [{"from": "human", "value": 3}]}, says("'from'", "text 'value'")),
        ({**ENTRY, "image": 3}, says("'image'", "file name")),
        ({**ENTRY, "image": 0, "conversations": [TEXT_ONLY, ANSWER]}, says("'image'", "file name")),
        ({**ENTRY, "image": False, "conversations": [TEXT_ONLY, ANSWER]}, says("'image'", "file name")),
        ({**ENTRY, "image": ["picture.png", ""]}, says("'image'", "file name")),
        ({**ENTRY, "image": None}, r"\b0 image.*\b1 <image>"),
        ({**ENTRY, "image": ["picture.png"] * 2}, r"\b2 image.*\b1 <image>"),
        ({**ENTRY, "conversations": [ANSWER]}, r"\b1 image.*\b0 <image>"),
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
        ("d.json", "[{", says("d.json", "JSON", "byte")),
        ("d.json", "{}", says("d.json", "JSON list")),
        ("d.json", "[]", says("d.json", "no records")),
        ("d.json", '[{"id": 1}, {"id": 2} {"id": 3}]', says("d.json", "JSON", "',' or ']'", "byte 22")),
        ("d.json", '[{"id": 1}', says("d.json", "JSON", "byte")),
        ("d.json", '[{"id": 1,}]', r"d\.json.* JSON.* byte 1[01]\b"),
        ("d.json", '[{"id": 1}] []', says("d.json", "behind the list")),
        ("d.json", "", says("d.json", "JSON", "value")),
        ("d.json", '{"id": 1}\n{"id": 2}', says("d.json", "JSON", "object per line", "jsonl")),
        ("d.jsonl", '{"id": 1', says("d.jsonl:1", "JSON")),
        ("d.jsonl", "\n\n", says("d.jsonl", "no records")),
        ("d.csv", "a,b", says("'.csv'", "llava_json (*.json)", "jsonl (*.jsonl)", "hf")),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_records(write(tmp_path / name, content))


@pytest.mark.parametrize("format", ["jsonl", "llava_json"])
def test_a_file_that_cannot_be_opened(tmp_path, format):
    with pytest.raises(ValueError, match=says(format, "directory")) as error:
        read_records(tmp_path, format=format)
    assert str(error.value).startswith(f"{tmp_path}: ")


def test_a_directory_of_json_is_one_data_set(tmp_path, picture):
    """Files in order of their names, lists and lines, both layouts; what lies beside them is left alone."""
    image = picture()
    messages = {"images": ["picture.png"], "messages": [{"role": "user", "content": "<image>Hi"}]}
    write(tmp_path / "b.json", [{**ENTRY, "id": "b0"}, {**ENTRY, "id": "b1"}])
    write(tmp_path / "a.jsonl", json.dumps({**messages, "id": "a0"}) + "\n\n" + json.dumps({**ENTRY, "id": "a1"}))
    write(tmp_path / "c.json", [])
    (tmp_path / "below").mkdir()
    write(tmp_path / "below" / "d.json", "not for us")
    records = read_records(tmp_path)
    assert [record.id for record in records] == ["a0", "a1", "b0", "b1"]
    assert records[3].origin == f"{tmp_path}/b.json[1]" and records[1].origin == f"{tmp_path}/a.jsonl:3"
    assert {source for record in records for source in record.images} == {image}
    assert pickle.loads(pickle.dumps(records))[3] == records[3]
    assert [record.id for record in read_records(tmp_path, format="llava_json")] == ["b0", "b1"]
    assert [record.id for record in read_records(tmp_path, format="jsonl")] == ["a0", "a1"]
    first = records.fingerprint()
    picture(40, 40)
    assert read_records(tmp_path).fingerprint() == first
    write(tmp_path / "c.json", [ENTRY])
    assert read_records(tmp_path).fingerprint() != first


def test_a_directory_with_a_file_that_is_no_list_of_records(tmp_path):
    write(tmp_path / "a.json", [{**ENTRY, "image": None, "conversations": [TEXT_ONLY, ANSWER]}])
    write(tmp_path / "info.json", {"version": 1})
    with pytest.raises(ValueError, match=says("info.json", "list of records")):
        read_records(tmp_path)


def test_messages_are_a_format_too(tmp_path):
    entry = {"messages": [{"role": "user", "content": "Hi"}]}
    for name, content in (("a.txt", [entry]), ("b.txt", json.dumps(entry)), ("c.jsonl", json.dumps(entry))):
        assert len(read_records(write(tmp_path / name, content), format="messages")) == 1


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
@pytest.mark.parametrize("twice", ['"image": "a.png"', '"conversations": []', '"\\u0069mage": "a.png"'])
def test_a_key_that_stands_twice_is_refused(tmp_path, name, twice):
    """`json` keeps the last one, and says nothing."""
    text = "{" + twice + ", " + json.dumps(ENTRY)[1:]
    key = "conversations" if "conversations" in twice else "image"
    with pytest.raises(ValueError, match=says(name, f"'{key}'", "twice")):
        read_records(write(tmp_path / name, f"[{text}]" if name == "d.json" else text))


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_json_nested_too_deeply_is_one_line(tmp_path, name):
    path = write(tmp_path / name, '[{"id": ' + "[" * 200_000 + "]" * 200_000 + "}]")
    with pytest.raises(ValueError, match=says(name, "JSON")) as error:
        read_records(path)
    assert len(str(error.value)) < 400


def test_missing_files(tmp_path):
    path = write(tmp_path / "d.json", [ENTRY])
    with pytest.raises(FileNotFoundError, match=says("id a", "picture.png", "exist")):
        read_records(path)
    assert len(read_records(path, check=False)) == 1
    with pytest.raises(FileNotFoundError, match=says("data file")):
        read_records(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=says("image folder")):
        read_records(path, image_root=tmp_path / "none")


@pytest.mark.parametrize("name", ["none.png", "x" * 300, "half\0name.png", "d.json/a.png"])
def test_names_of_pictures_that_are_not_there(tmp_path, name):
    path = write(tmp_path / "d.json", [{**ENTRY, "image": name}])
    with pytest.raises(FileNotFoundError, match=says("d.json[0]", "id a", "exist", "image root")):
        read_records(path)


def test_a_format_can_be_named(tmp_path, picture):
    picture()
    assert len(read_records(write(tmp_path / "d.txt", json.dumps(ENTRY)), format="jsonl")) == 1


AWKWARD = ["\u00e9t\u00e9 \U0001f408", 'brackets ]}[{ "quoted" \\ and \\" more', "", "line\nbreak", "x" * 300, "\ud83d"]


@pytest.mark.parametrize("block", [7, 64, 1 << 22])
@pytest.mark.parametrize("style", [{}, {"ensure_ascii": False, "indent": 1}, {"separators": (",", ":")}])
def test_records_are_found_in_any_json(tmp_path, monkeypatch, block, style):
    """Block by block: no object, escape or letter of several bytes is torn apart."""
    monkeypatch.setattr(text, "BYTES_AT_A_TIME", block)
    texts = AWKWARD[:-1] if style.get("ensure_ascii") is False else AWKWARD  # a lone surrogate has no UTF-8
    entries = [{"id": i, "conversations": [{"from": "human", "value": value}]} for i, value in enumerate(texts)]
    content = json.dumps(entries, **style)
    for mark in ("", "\ufeff"):
        path = tmp_path / "d.json"
        path.write_text(mark + content + " \n", encoding="utf-8", errors="surrogatepass")
        records = read_records(path)
        assert [record.turns[0].text for record in records] == texts
        assert [record.id for record in records] == [str(i) for i in range(len(texts))]


def test_records_are_decoded_when_asked_for(tmp_path):
    """An invalid one is no obstacle to the others; what travels to a worker is numbers, not text."""
    entries = [{"id": i, "conversations": [{"from": "human", "value": "w" * 1000}]} for i in range(100)]
    entries[3]["conversations"] = None
    for name in ("d.json", "d.jsonl"):
        lines = entries if name == "d.json" else "\n".join(map(json.dumps, entries))
        records = read_records(write(tmp_path / name, lines), check=False)
        with pytest.raises(RecordError, match=says("'conversations'", "'messages'", "id, conversations")) as error:
            records[3]
        assert (error.value.id, error.value.origin) == (
            "3",
            str(tmp_path / name) + ("[3]" if name == "d.json" else ":4"),
        )
        packed = pickle.dumps(records)
        assert len(packed) < 5000
        assert pickle.loads(packed)[99] == records[-1] == records[90:][9]
        assert isinstance(records[1:3], Records) and [record.id for record in records[1:3]] == ["1", "2"]
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.reason) == (str(error.value), error.value.reason)


def test_the_fingerprint_follows_files_and_choice(tmp_path):
    path = write(tmp_path / "d.json", [{"id": i, "conversations": [ANSWER]} for i in range(3)])
    records = read_records(path)
    first = records.fingerprint()
    assert read_records(path).fingerprint() == first and records[:2].fingerprint() != first
    write(path, [{"id": i, "conversations": [ANSWER, ANSWER]} for i in range(3)])
    assert read_records(path).fingerprint() != first


def test_a_new_reader_is_a_function_and_a_row(tmp_path, picture, monkeypatch):
    def read_tsv(path: Path):
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        return [
            (f"{path}:{n}", {"image": image, "conversations": [{**ASK, "value": f"<image>\n{question}"}, ANSWER]})
            for n, (image, question) in enumerate(rows, start=1)
        ]

    monkeypatch.setitem(READERS, "tsv", read_tsv)
    image = picture()
    records = read_records(write(tmp_path / "d.tsv", "picture.png\tWhat?\npicture.png\tWhere?\n"), format="tsv")
    assert [record.turns[0].text for record in records] == ["<image>\nWhat?", "<image>\nWhere?"]
    assert records[1].images == (image,) and records[1].origin.endswith("d.tsv:2")
