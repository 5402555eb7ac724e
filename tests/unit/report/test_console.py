"""The one console: on the first rank, at a width that cuts nothing where it is a file."""

from __future__ import annotations

import pytest

from llava_pdrop.report.console import LOG_WIDTH, console, grid, say


def test_a_line_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("x" * 2 * LOG_WIDTH + " [bold]")
    assert capsys.readouterr().out == "x" * 2 * LOG_WIDTH + " [bold]\n"


def test_only_the_first_rank_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    say("of rank 1")
    console().print("so is this")
    assert capsys.readouterr().out == ""


def test_a_file_has_a_width_of_its_own() -> None:
    assert console().width == LOG_WIDTH


def test_names_are_whole_however_many_columns_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    grid("", ["arm", *["measurement"] * 20], [["PyramidDrop", *["0"] * 20]], left=1)
    shown = capsys.readouterr().out
    assert "PyramidDrop" in shown and "measurement" not in shown
