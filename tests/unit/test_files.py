"""Files that are there whole or not at all, and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from llava_pdrop.errors import MissingFileError, UserError
from llava_pdrop.files import read_json, replacing, write_json, write_lines
from tests.messages import says


@dataclass
class Pair:
    left: tuple[int, int]
    right: Path


def test_a_file_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "made" / "a.txt"
    with replacing(file) as aside:
        aside.write_text("before")
        assert not file.exists()
    with pytest.raises(UnicodeEncodeError), replacing(file) as aside:
        aside.write_text("hal" + "\udc80", encoding="utf-8")
    assert file.read_text() == "before" and list(file.parent.iterdir()) == [file]


def test_json_has_dataclasses_paths_and_half_characters(tmp_path: Path) -> None:
    value = {"pairs": [Pair((1, 2), Path("é"))], "half": "\udc80"}
    file = write_json(tmp_path / "x.json", value, indent=None)
    assert file.read_text(encoding="utf-8") == '{"pairs":[{"left":[1,2],"right":"é"}],"half":"\\udc80"}\n'
    assert read_json(file) == read_json(write_json(file, value))
    lines = write_lines(tmp_path / "x.jsonl", [value["pairs"][0], {"half": "\udc80"}]).read_text(encoding="utf-8")
    assert [json.loads(line) for line in lines.splitlines()] == [{"left": [1, 2], "right": "é"}, {"half": "\udc80"}]


def test_what_is_no_json_object_is_said_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(MissingFileError, match=says(str(file), "no such file")):
        read_json(file)
    for content, cause in (("{", "JSON"), ("[1]", "object"), (b"\xff", "JSON")):
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=says(str(file), cause)):
            read_json(file)
