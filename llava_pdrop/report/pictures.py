"""How pictures are drawn: on a canvas of their own, and never at the price of the work that they show.

A notebook sets ``MPLBACKEND`` to its own window, a cluster's profile to another: matplotlib cannot even be imported
where that one is not installed, and the caller's own windows are not ours to change. So nothing here asks for a window
(`matplotlib.pyplot`), and matplotlib is imported when the first picture is drawn: what fails by then is one line, and
no picture.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_pdrop.errors import clip, first_line

log = logging.getLogger(__name__)

INK, GRID = "#22303C", "#DDE3E8"
"""Colours of text and of grid lines."""

STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
}
"""For ``matplotlib.pyplot.rc_context``."""

COLOURS = {"vanilla": "#6B7C8F", "pyramid_drop": "#E2703A"}
"""Run -> colour, in all pictures."""

BACKEND_VARIABLES = ("MPLBACKEND", "MATPLOTLIBRC")
"""Environment variables by which somebody says how matplotlib is to show pictures. These here are only written."""


def subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """As `matplotlib.pyplot.subplots`: a figure, which no window knows, and its axes. ``figsize`` and ``layout`` are
    the figure's options."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**{name: options.pop(name) for name in ("figsize", "layout") if name in options})
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **options)


def figure_of(draw: Callable[[], Any]) -> Any:
    """The figure that ``draw`` makes by `subplots`, in the project's style."""
    with _imported().rc_context(STYLE):
        return draw()


def save_picture(file: Path, draw: Callable[[], Any], **options: Any) -> bool:
    """Saves the figure that ``draw`` makes by `subplots`, in the project's style. Returns whether it lies in ``file``:
    what else can fail, in ``draw`` or in matplotlib, is said in one line.

    Args:
        options: of `matplotlib.figure.Figure.savefig`.
    """
    try:
        with _imported().rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a model's answer may hold any character
            draw().savefig(file, **options)
    except Exception as error:  # noqa: BLE001  whatever it is: the picture shows work that is done, and goes without
        reason = clip(first_line(error))  # matplotlib lists all that it knows behind what it does not
        log.warning("%s is not drawn (%s: %s); all else is as it would be", file, type(error).__name__, reason)
        file.unlink(missing_ok=True)  # half of one, or that of an earlier run
        return False
    return True


def _imported() -> Any:
    """Matplotlib, without what the environment asks of it."""
    kept = {name: os.environ.pop(name) for name in BACKEND_VARIABLES if name in os.environ}
    try:
        return importlib.import_module("matplotlib")
    finally:
        os.environ.update(kept)
