"""The histograms of a data set's check."""

from __future__ import annotations

from typing import Any

import numpy as np

from llava_pdrop.report.pictures import subplots

BAR, MARK = "#3E5C76", "#E2703A"

LARGEST = 99.9
"""Percentile up to which lengths and sizes are drawn; the last bin holds what lies behind."""


def length_histogram(lengths: np.ndarray, limit: int | None) -> Any:
    """How many records have how many tokens, before truncation; ``limit`` is marked."""
    figure, axes = subplots(figsize=(7.2, 3.4), layout="constrained")
    end = max(float(np.percentile(lengths, LARGEST)), float(lengths.min()) + 1)
    axes.hist(np.minimum(lengths, end), bins=60, color=BAR)
    axes.locator_params(axis="x", integer=True)
    if limit is not None and limit <= end * 1.3:
        over = int((lengths > limit).sum())
        axes.axvline(limit, color=MARK, linewidth=2, label=f"data.max_length {limit:,}: {over:,} are longer")
        axes.legend()
    axes.set(
        xlabel=f"tokens, image tokens included (longest: {int(lengths.max()):,})",
        ylabel="records",
        title=f"Length of {len(lengths):,} records",
    )
    return figure


def size_histogram(sizes: np.ndarray) -> Any:
    """How many pictures have which width and height; ``sizes`` is (m, 2)."""
    figure, axes = subplots(figsize=(5.6, 4.6), layout="constrained")
    ends = np.percentile(sizes, LARGEST, axis=0)
    edges = [np.linspace(0, end * 1.05 + 1, 49) for end in ends]
    widths, heights = np.minimum(sizes, ends).T
    counts, *_ = np.histogram2d(widths, heights, bins=edges)
    shown, most = np.ma.masked_equal(counts.T, 0), max(2.0, float(counts.max()))
    mesh = axes.pcolormesh(*edges, shown, cmap="viridis_r", norm="log", vmin=1, vmax=most)
    figure.colorbar(mesh, ax=axes, label="images")
    largest = "x".join(str(side) for side in sizes[sizes.prod(axis=1).argmax()])
    axes.set(
        xlabel="width (pixels)",
        ylabel="height (pixels)",
        title=f"Sizes of {len(sizes):,} images (largest: {largest})",
    )
    return figure
