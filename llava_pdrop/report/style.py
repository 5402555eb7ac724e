"""How the project's tables and pictures look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

INK, GRID = "#22303C", "#DDE3E8"
"""Colours of text and of grid lines."""

STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
"""For ``matplotlib.pyplot.rc_context``."""

TABLE_WIDTH = 160
"""Columns of the table where the output is no terminal (a log file), which has no width of its own."""

COLOURS = {"vanilla": "#6B7C8F", "pyramid_drop": "#E2703A"}
"""Run -> colour, in all pictures."""


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> str:
    """A Markdown table, ending with a newline; columns behind the first are aligned to the ``right``, being numbers."""
    ruler = ["---", *["---:" if right else "---"] * (len(headers) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (headers, ruler, *rows))


def print_table(title: str, rows: Sequence[Sequence[str]], right: bool = True) -> None:
    """Prints ``rows``, whose first one is the head; into a file at a width that cuts nothing. All columns but the first
    are aligned to the ``right``, being numbers."""
    head, *lines = rows
    shown = Table(title=title, header_style="bold", box=box.SIMPLE_HEAD)
    for column, name in enumerate(head):
        shown.add_column(name, justify="right" if right and column else "left", overflow="fold")
    for line in lines:
        shown.add_row(*line)
    console = Console()
    (console if console.is_terminal else Console(width=TABLE_WIDTH)).print(shown)


def text_of(value: float | None, style: str) -> str:
    """``value`` for a cell of a table, by a format specification; nothing for None."""
    return "" if value is None else format(value, style)
