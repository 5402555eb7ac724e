"""Tables as text, and on a screen that is none."""

from __future__ import annotations

import pytest

from llava_pdrop.report.style import TABLE_WIDTH, markdown_table, print_table, text_of


def test_markdown_table() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |\n"
    assert markdown_table(["a", "b"], [], right=False) == "| a | b |\n| --- | --- |\n"


def test_a_table_in_a_log_file_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "x" * (TABLE_WIDTH - 20)
    print_table("Title", [["name", "value"], [wide, "1"], ["y", "234"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert any(wide in line and line.endswith("  1") for line in lines) and any(line.endswith("234") for line in lines)


def test_no_value_is_no_text() -> None:
    assert (text_of(None, ".1%"), text_of(0.0, ".1%")) == ("", "0.0%")
