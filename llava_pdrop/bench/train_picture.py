"""The picture of ``llava-pdrop bench train``: where the time of a step goes."""

from __future__ import annotations

from typing import Any

from llava_pdrop.report.pictures import subplots
from llava_pdrop.report.units import digits, time_unit

BARS = {
    "tower": ("tower forward", "#3E5C76"),
    "embedding": ("projector, embedding", "#748CAB"),
    "decoder": ("decoder forward", "#6B7C8F"),
    "ranking": ("ranking and dropping", "#D7263D"),
    "head": ("head and loss", "#F2B134"),
    "backward": ("backward", "#E2703A"),
    "tower_backward": ("tower backward", "#9A5B3C"),
    "optimizer": ("optimizer", "#8AB17D"),
}
"""Part of a step (`clock.PIECES`) -> what it is called and its colour."""


def step_bars(report: dict[str, Any]) -> Any:
    """A bar per run, stacked by where the time of its median step goes."""
    runs = [run for run in report["runs"] if "parts" in run]
    unit = time_unit(sum(run["parts"].values()) for run in runs)
    figure, axes = subplots(figsize=(8.4, 2.0 + 0.7 * len(runs)), layout="constrained")
    for place, run in enumerate(runs):
        left = 0.0
        for part, (label, colour) in BARS.items():
            width = max(0.0, run["parts"][part]) / unit.size
            axes.barh(place, width, left=left, height=0.6, color=colour, label=label if place == 0 else None)
            left += width
        saved = run.get("realised_reduction")
        text = f" {digits(left)} {unit.name}" + (f"  ({-saved:+.1%})" if saved is not None else "")
        axes.text(left, place, text, va="center", ha="left")
    axes.set_yticks(range(len(runs)), [run["name"] for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.margins(x=0.22)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"time of a training step in {unit.name} (medians of its parts; clock: {report['clock']})")
    axes.set_title(f"Where the time goes: {report['shape']['name']} on {report['environment']['device']}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure
