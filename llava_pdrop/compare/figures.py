"""The pictures of variants: loss, time, image tokens and accuracy, with and without drops in two colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_pdrop.compare.pareto import ANSWER, TRAINING, Shown
from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.report.pictures import COLOURS, INK, subplots
from llava_pdrop.report.units import Unit, time_unit

Values = Sequence[float | None]
Marks = dict[str, tuple[str, Values]]
"""Label -> (marker, where it is on the bar of each row)."""

PANEL = (5.6, 5.0)
"""Inches."""

MARKERS = {False: "o", True: "^"}
"""Of points that were trained, and that are training-free."""

TIMES = {TRAINING: "time of training", ANSWER: "time of an answer"}
"""The panels of a Pareto front."""

KINDS = {"vanilla": COLOURS["vanilla"], "drops": COLOURS["pyramid_drop"], "simple baseline": "#2A6F97"}
"""Its colours."""

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


def pareto(shown: Sequence[Shown]) -> Any:
    """Score over the time of a training, and over that of an answer, with standard errors over seeds. A line joins the
    Pareto front of each; what lies behind it is pale. Names that would cover another are left out."""
    scored = [each for each in shown if each.score]
    panels = [key for key in TIMES if any(key in each.times for each in scored)]
    percent = 100 if any(each.row.accuracy is not None for each in scored) else 1
    size = (PANEL[0] * len(panels), PANEL[1])
    figure, ((*grid,),) = subplots(1, len(panels), sharey=True, figsize=size, layout="constrained", squeeze=False)
    for kind, free in dict.fromkeys((_kind(each), each.training_free) for each in scored):
        label = f"{kind}, training-free" if free else kind
        grid[0].plot([], [], MARKERS[free], color=KINDS[kind], label=label)
    for axes, key in zip(grid, panels):
        timed = [each for each in scored if key in each.times]
        share = key == TRAINING and timed[0].relative
        unit = Unit("% of vanilla's", 0.01) if share else time_unit([each.times[key][0] for each in timed])
        names = list[tuple[float, float, str, bool]]()
        for each in timed:
            x, x_error = (value / unit.size for value in each.times[key])
            y, y_error = (value * percent for value in each.score or ())
            on, several = key in each.fronts, len(each.row.runs) > 1
            axes.errorbar(
                *(x, y, y_error if several else None, x_error if several else None),
                fmt=MARKERS[each.training_free],
                color=KINDS[_kind(each)],
                alpha=1.0 if on else 0.35,
                markersize=7,
                capsize=2,
            )
            names.append((x, y, each.row.name.replace("vanilla + ", "+ "), on))
        axes.plot(*zip(*sorted((x, y) for x, y, _, on in names if on)), color=INK, linewidth=1, zorder=1)
        axes.set(xlabel=f"{TIMES[key]}, {unit.name}")
        axes.margins(x=0.2, y=0.08)
        _names(axes, names)
    grid[0].set_ylabel("accuracy, %" if percent == 100 else "score")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _names(axes: Any, names: Sequence[tuple[float, float, str, bool]]) -> None:
    """Writes (x, y, name, on the front) beside their points, those on the front first, as long as there is room."""
    axes.autoscale_view()  # so that the places are known
    taken = list[tuple[float, float, float, float]]()
    for x, y, name, on in sorted(names, key=lambda each: not each[3]):
        across, up = (72 * 0.8 * side * part for side, part in zip(PANEL, axes.transLimits.transform((x, y))))
        size = 8 if on else 6
        right, top = across + 5 + 0.62 * size * len(name), up + 1.3 * size
        if any(across < r and right > a and up < t and top > u for a, u, r, t in taken):
            continue
        taken.append((across, up, right, top))
        axes.annotate(
            name, (x, y), (5, 4), textcoords="offset points", fontsize=size, color=INK, alpha=1.0 if on else 0.6
        )


def _kind(each: Shown) -> str:
    return "vanilla" if each.row.schedule.vanilla else "simple baseline" if each.baseline else "drops"


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
