"""The pictures of a report."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_pdrop.compare.rows import Comparison, ComparisonRow, Example
from llava_pdrop.report.pictures import save_picture, subplots
from llava_pdrop.report.style import COLOURS, GRID, INK

LABELS = {"vanilla": "vanilla", "pyramid_drop": "PyramidDrop"}


def draw(comparison: Comparison, directory: Path) -> dict[str, str]:
    """Draws what there is material for; returns what is shown -> file name in ``directory``."""
    wanted: dict[str, tuple[str, Callable[[], Any]]] = {}
    if any(comparison.losses.values()):
        wanted["loss"] = "loss.png", lambda: loss_curves(comparison.losses)
    if any(row.timing is not None for row in comparison.rows):
        wanted["time"] = "step_time.png", lambda: step_times(comparison.rows)
    if comparison.examples:
        wanted["tokens"] = "tokens.png", lambda: surviving_tokens(comparison.examples)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # an answer may hold any character
        return {
            shown: name
            for shown, (name, figure) in wanted.items()
            if save_picture(directory / name, figure, facecolor="white")
        }


def loss_curves(losses: dict[str, list[tuple[int, float]]]) -> Any:
    """Loss per label token over steps, faint, with a running mean in front."""
    figure, axes = subplots(figsize=(7.2, 3.6), layout="constrained")
    for name, points in losses.items():
        if not points:
            continue
        steps, values = (np.asarray(column, dtype=float) for column in zip(*points))
        axes.plot(steps, values, color=COLOURS[name], alpha=0.25, linewidth=1)
        axes.plot(
            steps, running_mean(values, max(1, len(values) // 20)), color=COLOURS[name], label=LABELS[name], linewidth=2
        )
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


def step_times(rows: Sequence[ComparisonRow]) -> Any:
    """Bars of seconds per step, with a mark where the count of operations says PyramidDrop's should end."""
    timed = [row for row in rows if row.timing is not None]
    kind = "wall seconds (CUDA events)" if timed[0].timing.device == "cuda" else "CPU seconds"
    figure, axes = subplots(figsize=(7.2, 0.9 + 0.75 * len(timed)), layout="constrained")
    full = timed[0].timing.seconds if timed[0].name == "vanilla" else None
    for place, row in enumerate(timed):
        seconds = row.timing.seconds
        axes.barh(place, seconds, height=0.55, color=COLOURS[row.name])
        text = f"{seconds:.3g} s"
        if row.realised is not None:
            text += f"   {-row.realised:+.0%}{' taking turns' if row.saving.quartiles else ''}"
        axes.text(seconds * 0.985, place, text, va="center", ha="right", color="white", fontweight="bold")
        if row.predicted is not None and full is not None:
            mark = full * (1 - row.predicted)
            axes.plot([mark, mark], [place - 0.36, place + 0.36], color=INK, linewidth=2)
            axes.text(mark, place + 0.4, f"predicted {-row.predicted:+.0%}", ha="center", va="top", fontsize=8.5)
    axes.set_yticks(range(len(timed)), [LABELS[row.name] for row in timed])
    axes.set_ylim(len(timed) - 0.35, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=f"{kind} per training step (median)", title="Time per training step")
    return figure


def surviving_tokens(examples: Sequence[Example]) -> Any:
    """A row per example: the picture, then what is left of it after every drop; dropped patches are dark."""
    columns = len(examples[0].kept)
    shape = np.asarray(examples[0].kept[0].shape)
    height = 2.3 * min(1.6, max(0.6, shape[0] / shape[1]))
    figure, grid = subplots(
        len(examples),
        columns,
        figsize=(2.3 * columns + 1.9, (height + 0.35) * len(examples)),
        layout="constrained",
        squeeze=False,
    )
    for axes_row, example in zip(grid, examples):
        for stage, (axes, kept) in enumerate(zip(axes_row, example.kept)):
            axes.imshow(shade(np.asarray(example.picture), kept, example.patch), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set(visible=True, color=GRID)
            name = "all" if stage == 0 else f"after drop {stage}"
            axes.set_title(f"{name}: {int(kept.sum())} tokens", fontsize=9, fontweight="normal")
        _caption(axes_row[0], example)
    return figure


def shade(picture: np.ndarray, kept: np.ndarray, patch: int) -> np.ndarray:
    """``picture`` (height, width, 3) uint8 with the patches that are not ``kept`` (rows, columns) dark and grey."""
    mask = np.repeat(np.repeat(kept, patch, 0), patch, 1)[: picture.shape[0], : picture.shape[1], None]
    grey = picture.mean(-1, keepdims=True)
    dark = np.broadcast_to(28 + 0.28 * grey, picture.shape)
    return np.where(mask, picture, dark).astype(np.uint8)


def _caption(axes: Any, example: Example) -> None:
    right = example.answer.strip().lower() == example.gold.strip().lower()
    question, gold, answer = (
        textwrap.shorten("".join(c if c.isprintable() else " " for c in text), length, placeholder=" …")
        for text, length in ((example.question, 90), (example.gold, 24), (example.answer, 24))
    )
    axes.annotate(
        "\n".join(textwrap.wrap(question, 22)),
        (-0.08, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=9,
    )  # fmt: skip
    axes.annotate(
        f"gold: {gold}\nmodel: {answer or '(nothing)'}",
        (-0.08, 0.02), xycoords="axes fraction", ha="right", va="bottom", fontsize=9, fontweight="bold",
        color="#2B7A4B" if right else "#B3372F",
    )  # fmt: skip
