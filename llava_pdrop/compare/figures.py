"""The pictures of variants: loss, time, image tokens and accuracy, with and without drops in two colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.report.pictures import COLOURS, INK, subplots
from llava_pdrop.report.units import time_unit

Values = Sequence[float | None]
Marks = dict[str, tuple[str, Values]]
"""Label -> (marker, where it is on the bar of each row)."""

LABELS = {"vanilla": "vanilla", "pyramid_drop": "PyramidDrop"}


def loss_curves(losses: dict[str, list[tuple[int, float]]]) -> Any:
    """Loss per label token over steps, faint, with a running mean in front."""
    figure, axes = subplots(figsize=(7.2, 3.6), layout="constrained")
    for name, points in losses.items():
        if not points:
            continue
        steps, values = (np.asarray(column, dtype=float) for column in zip(*points))
        mean = running_mean(values, max(1, len(values) // 20))
        axes.plot(steps, values, color=COLOURS[name], alpha=0.25, linewidth=1)
        axes.plot(steps, mean, color=COLOURS[name], label=LABELS[name], linewidth=2)
    axes.set(xlabel="optimizer step", ylabel="loss per answer token (nats)", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.legend()
    return figure


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value and the ``reach`` values on both sides of it, as far as there are any."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def step_times(rows: Sequence[VariantRow]) -> Any:
    """A bar per trained row: its median step, with a mark where the count of operations says that it should end."""
    rows = [row for row in rows if row.timing]
    seconds = [row.seconds or 0.0 for row in rows]
    unit = time_unit(seconds)
    full = next((row.seconds for row in rows if row.seconds and row.schedule.vanilla), None)
    predicted = [full * (1 - row.predicted) / unit.size if full and row.predicted else None for row in rows]
    figure, axes = subplots(figsize=(7.2, 0.9 + 0.75 * len(rows)), layout="constrained")
    texts = [f"{unit.text(row.seconds)} {unit.name}{_less(row.realised)}" for row in rows]
    _bars(axes, rows, [number / unit.size for number in seconds], texts, {"predicted": ("|", predicted)})
    _lines(axes, rows)
    kind = "wall time, by CUDA events" if rows[0].device == "cuda" else "CPU time"
    axes.set(xlabel=f"{unit.name} ({kind})", title="Time per training step, median")
    if any(predicted):
        figure.legend(loc="outside lower right", fontsize=9)
    return figure


def variants(rows: Sequence[VariantRow]) -> Any:
    """A line per row: mean image tokens, time saved (with marks where the count of operations and the paper have it)
    and accuracy, each where it is known."""
    measured = any(row.realised is not None for row in rows)
    saved = [row.realised if measured else row.predicted for row in rows]
    marks: Marks = {"the paper, GPU hours": ("o", [_percent(row.saved_in_paper) for row in rows])}
    if measured:
        marks |= {"predicted": ("|", [_percent(row.predicted) for row in rows])}
    of = "an answer" if any(row.answer_seconds and not row.timing for row in rows) else "a training step"
    title = f"{'time' if measured else 'operations'} of {of} saved"
    tokens = [row.plan.average_tokens if row.plan else None for row in rows]
    accuracy = [_percent(row.accuracy) for row in rows]
    panels: list[tuple[str, Values, str, Marks]] = []
    if any(tokens):
        panels.append(("image tokens, mean of the layers", tokens, "{:.0f}", {}))
    panels.append((title, [_percent(share) for share in saved], "{:.0f} %", marks))
    if any(number is not None for number in accuracy):
        panels.append(("accuracy", accuracy, "{:.1f} %", {}))

    size = (1.6 + 3.1 * len(panels), 1.5 + 0.42 * len(rows))
    figure, ((*grid,),) = subplots(1, len(panels), sharey=True, figsize=size, layout="constrained", squeeze=False)
    for axes, (title, values, text, own) in zip(grid, panels):
        _bars(axes, rows, values, ["" if value is None else text.format(value) for value in values], own)
        axes.set(title=title)
        if title == "accuracy":
            axes.set_xlim(0, 100)
            chance = next((row.evaluation.get("chance") for row in rows if row.evaluation), None)
            if chance is not None:
                axes.axvline(100 * chance, color=INK, linestyle=":", linewidth=1, zorder=0.5, label="chance")
    _lines(grid[0], rows)
    if any(axes.get_legend_handles_labels()[0] for axes in grid):
        figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _lines(axes: Any, rows: Sequence[VariantRow]) -> None:
    """The first row on top, by its name."""
    axes.set_yticks(range(len(rows)), [LABELS.get(row.name, row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _bars(axes: Any, rows: Sequence[VariantRow], values: Values, texts: Sequence[str], marks: Marks) -> None:
    """A bar for every row with its text in it, or behind it where it is short."""
    ends = [value or 0.0 for value in values]
    kinds = ["vanilla" if row.schedule.vanilla else "pyramid_drop" for row in rows]
    axes.barh(range(len(rows)), ends, 0.6, color=[COLOURS[kind] for kind in kinds])
    axes.margins(x=0.1)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    for row, value in enumerate(values):
        if value is None:
            continue
        inside = value > 0.25 * max(ends)
        where = dict(textcoords="offset points", va="center", color="white" if inside else INK, fontweight="bold")
        axes.annotate(texts[row], (0.0 if inside else max(value, 0.0), row), (7, 0), **where)
    for label, (marker, places) in marks.items():
        points = [(value, row) for row, value in enumerate(places) if value is not None]
        if points:
            axes.plot(*zip(*points), marker, color=INK, markersize=9, label=label)


def _less(share: float | None) -> str:
    return "" if share is None else f"   {-share:+.1%}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
