"""Where lines and tables go: the one console of the project, and only that of the first rank."""

from __future__ import annotations

import os

from rich.console import Console

LOG_WIDTH = 160
"""Columns where the output is no terminal (a log file), which has no width of its own."""


def console() -> Console:
    """A console on today's standard output. Of several ranks the first one alone prints."""
    shown = Console(quiet=os.environ.get("RANK", "0") != "0")
    return shown if shown.is_terminal else Console(quiet=shown.quiet, width=LOG_WIDTH)


def say(line: str) -> None:
    """Prints a line that must stay one line, and is no markup."""
    console().print(line, soft_wrap=True, markup=False, highlight=False)
