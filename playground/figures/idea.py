"""Draws idea.svg, the figure at the top of the README: python playground/figures/idea.py

It is a schematic. Which squares stay is not measured: they are those near two places that a question might be about.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

TITLE = "Image tokens leave as the decoder gets deeper; text tokens always stay"
NOTE = "ranked by the attention that the last instruction token gives them, in training and in inference"
SIDE, CELL = 12, 11  # squares per side of a grid, pixels per square
STAGES = (("layers 0-7", 576), ("layers 8-15", 288), ("layers 16-23", 144), ("layers 24-31", 72))
KEPT, GONE, INK, SOFT, TEXT = "#E2703A", "#E9ECEF", "#1F2933", "#6B7C8F", "#3A8FB7"
WIDTH, GAP, LEFT, TOP = SIDE * CELL, 92, 24, 64


def scores(seed: int = 4) -> np.ndarray:
    """(SIDE, SIDE) importance: two spots, and some noise."""
    y, x = np.mgrid[:SIDE, :SIDE]
    spots = [np.exp(-((x - a) ** 2 + (y - b) ** 2) / width) for a, b, width in ((3.5, 7.5, 7), (8.5, 3, 4))]
    return sum(spots) + 0.45 * np.random.default_rng(seed).random((SIDE, SIDE))


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, weight: str = "normal") -> str:
    """Words centred at ``x``."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" font-weight="{weight}" '
        f'text-anchor="middle">{words}</text>'
    )


def grid(left: float, top: float, kept: np.ndarray) -> list[str]:
    """One square per group of image tokens; ``kept``: (SIDE, SIDE)."""
    size = f'width="{CELL - 1.5}" height="{CELL - 1.5}" rx="2"'
    return [
        f'<rect x="{left + column * CELL:g}" y="{top + row * CELL:g}" {size} '
        f'fill="{KEPT if kept[row, column] else GONE}"/>'
        for row in range(SIDE)
        for column in range(SIDE)
    ]


def draw() -> str:
    """The picture as SVG."""
    order = (-scores()).flatten().argsort().argsort().reshape(SIDE, SIDE)
    total = LEFT * 2 + len(STAGES) * WIDTH + (len(STAGES) - 1) * GAP
    height = TOP + WIDTH + 96
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{total}" height="{height}" fill="#FFFFFF"/>',
        text(total / 2, 26, TITLE, 17, weight="bold"),
    ]
    for number, (layers, tokens) in enumerate(STAGES):
        left = LEFT + number * (WIDTH + GAP)
        middle = left + WIDTH / 2
        parts += grid(left, TOP, order < SIDE * SIDE * tokens / STAGES[0][1])
        parts.append(text(middle, TOP - 10, layers, 14, weight="bold"))
        parts.append(text(middle, TOP + WIDTH + 22, f"{tokens} image tokens", 13, KEPT, "bold"))
        bar = WIDTH * 0.8
        image = bar * tokens / STAGES[0][1]
        top = TOP + WIDTH + 36
        parts.append(f'<rect x="{left}" y="{top}" width="{image:g}" height="14" fill="{KEPT}"/>')
        parts.append(f'<rect x="{left + image:g}" y="{top}" width="{WIDTH - bar:g}" height="14" fill="{TEXT}"/>')
        if number + 1 < len(STAGES):
            start, stop, y = left + WIDTH + 6, left + WIDTH + GAP - 8, TOP + WIDTH / 2
            parts.append(f'<path d="M{start} {y} H{stop - 7}" stroke="{SOFT}" stroke-width="2" fill="none"/>')
            parts.append(f'<path d="M{stop} {y} l-9 -5 v10 z" fill="{SOFT}"/>')
            parts.append(text((start + stop) / 2, y - 26, "rank by", 12, SOFT))
            parts.append(text((start + stop) / 2, y - 11, "attention", 12, SOFT))
            parts.append(text((start + stop) / 2, y + 21, "keep half", 12, SOFT))
    legend = TOP + WIDTH + 76
    parts.append(f'<rect x="{LEFT}" y="{legend - 10}" width="12" height="12" fill="{KEPT}"/>')
    parts.append(f'<rect x="{LEFT + 130}" y="{legend - 10}" width="12" height="12" fill="{TEXT}"/>')
    parts.append(text(LEFT + 66, legend, "image tokens", 12, SOFT))
    parts.append(text(LEFT + 188, legend, "text tokens", 12, SOFT))
    parts.append(text(total - LEFT - 272, legend, NOTE, 12, SOFT))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    file = Path(__file__).with_name("idea.svg")
    file.write_text(draw(), encoding="utf-8")
    print(f"written: {file}")
