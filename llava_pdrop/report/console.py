"""Where lines and tables go: the one console of the project, and only that of the first rank."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from llava_pdrop.world import is_first

LOG_WIDTH = 160
"""Columns where the output is no terminal (a log file), which has no width of its own."""

LONGEST_NAME = 14
"""A column of words no longer than this is shown whole, however narrow the terminal is."""


def console() -> Console:
    """A console on today's standard output. Of several ranks the first one alone prints."""
    shown = Console(quiet=not is_first())
    return shown if shown.is_terminal else Console(quiet=shown.quiet, width=LOG_WIDTH)


def say(line: str) -> None:
    """Prints a line that must stay one line, and is no markup."""
    console().print(line, soft_wrap=True, markup=False, highlight=False)


def paragraph(text: str) -> None:
    """Prints text: a terminal shows it wrapped at words, a log file has it in one line."""
    console().print(text, soft_wrap=not console().is_terminal, markup=False, highlight=False)


def grid(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    """Prints a table, as `report.page.Table` describes it, behind an empty line; into a file at a width that cuts
    nothing."""
    console().print(f"\n{title}" if title else "", style="bold", markup=False, highlight=False)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for place, name in enumerate(head):
        names = place < left and max((len(row[place]) for row in rows), default=0) <= LONGEST_NAME
        justify: JustifyMethod = "left" if place < left else "right"
        shown.add_column(escape(name), justify=justify, overflow="fold", no_wrap=names)
    for row in rows:
        shown.add_row(*map(escape, row))
    console().print(shown)
