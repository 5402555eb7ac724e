"""How the project's tables and pictures look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_pdrop.report.console import LOG_WIDTH as TABLE_WIDTH
from llava_pdrop.report.console import grid
from llava_pdrop.report.units import text_of

__all__ = ["COLOURS", "GRID", "INK", "STYLE", "TABLE_WIDTH", "markdown_table", "print_table", "text_of"]

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

COLOURS = {"vanilla": "#6B7C8F", "pyramid_drop": "#E2703A"}
"""Run -> colour, in all pictures."""


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], right: bool = True) -> str:
    """A Markdown table, ending with a newline; columns behind the first are aligned to the ``right``, being numbers."""
    ruler = ["---", *["---:" if right else "---"] * (len(headers) - 1)]
    return "".join("| " + " | ".join(line) + " |\n" for line in (headers, ruler, *rows))


def print_table(title: str, rows: Sequence[Sequence[str]], right: bool = True) -> None:
    """Prints ``rows``, whose first one is the head, as `markdown_table` aligns them."""
    head, *lines = rows
    grid(title, head, lines, left=1 if right else len(head))
