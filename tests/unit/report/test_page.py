"""A page: the same rows on the screen and in Markdown, numbers as JSON, pictures beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_pdrop.report.page import Code, Note, Page, Picture, Table, markdown_of
from llava_pdrop.report.pictures import subplots


def drawn() -> Any:
    return subplots(figsize=(1, 1))[0]


def test_markdown_aligns_numbers_to_the_right() -> None:
    assert Table(["a", "b"], [["x", "1"]]).markdown() == "| a | b |\n| --- | ---: |\n| x | 1 |\n"
    assert Table(["a", "b"], [], left=2).markdown() == "| a | b |\n| --- | --- |\n"


def test_a_stroke_in_a_cell_is_no_end_of_it() -> None:
    assert Table(["a", "b"], [["x|y", "1"]]).markdown().splitlines()[-1] == r"| x\|y | 1 |"


def test_columns_of_which_nothing_is_known_are_left_out() -> None:
    table = Table.of_columns([("run", ["a", "b"]), ("score", ["", ""]), ("seconds", ["1", ""])])
    assert (list(table.head), [list(row) for row in table.rows]) == (["run", "seconds"], [["a", "1"], ["b", ""]])


def test_a_table_in_a_log_file_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "x" * 140
    Table(["name", "value"], [[wide, "1"], ["[red]y", "234"]], "Title").show()
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any(wide in line and line.endswith("  1") for line in lines)
    assert any("[red]y" in line and line.endswith("234") for line in lines)


def test_a_page_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [
        "*Seen* by all.",
        Note("In the file."),
        Table(["a"], [["1"]], "Runs"),
        Picture("p.png", "what it is", drawn),
    ]
    page = Page("A title", blocks, {"a": (1, Path("x"))})
    page.show()
    shown = capsys.readouterr().out
    assert "Seen by all." in shown and "Runs" in shown and "In the file" not in shown
    files = page.write(tmp_path / "new", "page.md", "page.json")
    assert [file.name for file in files] == ["page.md", "page.json", "p.png"] and all(file.is_file() for file in files)
    assert files[0].read_text() == (
        "# A title\n\n*Seen* by all.\n\nIn the file.\n\n## Runs\n\n| a |\n| --- |\n| 1 |\n\n![what it is](p.png)\n"
    )
    assert json.loads(files[1].read_text()) == {"a": [1, "x"]}


def test_in_a_log_file_nothing_is_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    page = Page("", ["word " * 100, Code("a: *b* " * 100)])
    page.show()
    assert [line.count(" ") for line in capsys.readouterr().out.splitlines()] == [100, 200]
    assert markdown_of(page.blocks[1:]) == f"```\n{'a: *b* ' * 100}\n```\n"


def test_half_a_character_of_a_name_is_escaped(tmp_path: Path) -> None:
    page, facts = Page("A title", ["of \udcff"], {"name": "\udcff é"}).write(tmp_path, "page.md", "page.json")
    assert page.read_text(encoding="utf-8").endswith("of \\udcff\n")
    assert json.loads(facts.read_text(encoding="utf-8")) == {"name": "\udcff é"}


def test_a_page_goes_without_a_picture_that_cannot_be_drawn(tmp_path: Path) -> None:
    def broken() -> Any:
        raise RuntimeError("no font")

    files = Page("A title", [Picture("p.png", "what it is", broken)]).write(tmp_path, "page.md")
    assert [file.name for file in files] == ["page.md"] and "p.png" not in files[0].read_text()
