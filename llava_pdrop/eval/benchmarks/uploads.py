"""Files that a server or a judge takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_pdrop.errors import UserError
from llava_pdrop.eval.questions import Question


def write_sheet(rows: Sequence[Mapping[str, str | None]], file: Path) -> Path:
    """``file``, a spreadsheet whose head are the keys of the first of ``rows``. Whole numbers of a column ``index`` are
    numbers there; all else is text, even if it looks like a formula, without the control characters that no sheet
    holds."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(list(rows[0]))
    for row in rows:
        cells: list[Any] = []
        for name, value in row.items():
            if name == "index" and value is not None:
                cells.append(int(value))
            elif value is None:
                cells.append(None)
            else:
                cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
                cell.data_type = "s"
                cells.append(cell)
        sheet.append(cells)
    file.parent.mkdir(parents=True, exist_ok=True)
    book.save(file)
    return file


def all_answered(questions: Sequence[Question], answers: Sequence[str | None]) -> list[str]:
    """The answers, every one of which is there.

    Raises:
        UserError: one is not; the server takes no file with gaps.
    """
    missing = [question.id for question, answer in zip(questions, answers) if answer is None]
    if missing:
        raise UserError(
            f"question {missing[0]}: has no answer ({len(missing)} have none), and the server takes no file with gaps; "
            "start the evaluation again, it goes on where it was stopped"
        )
    return [answer for answer in answers if answer is not None]
