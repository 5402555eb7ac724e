"""What a grid of scores says: what a drop costs, and down to which depth a ranking is better than random choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from llava_pdrop.eval.score import Score
from llava_pdrop.study.budget import Losses
from llava_pdrop.study.grid import RANDOM, Cell, Grid

ERRORS = 2.0
"""Standard errors that a difference must exceed; else it is a tie."""


@dataclass(frozen=True)
class Difference:
    """``value`` of two scores of the same questions, in points, and its standard ``error`` over the questions."""

    value: float
    error: float

    @classmethod
    def of(cls, *pairs: tuple[Score, Score]) -> Difference:
        """The first score less the second, mean of the ``pairs``. Both were drawn with the same questions
        (`eval.interval`), so the error is that of paired differences."""
        draws = np.mean([one.draws - other.draws for one, other in pairs], axis=0)
        values = [(one.value or 0.0) - (other.value or 0.0) for one, other in pairs]
        return cls(float(np.mean(values)), float(draws.std(ddof=1)))

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``tie``."""
        if abs(self.value) <= ERRORS * self.error:
            return "tie"
        return "better" if self.value > 0 else "worse"


@dataclass(frozen=True)
class Findings:
    """The scores of a ``grid``, and that of the model without drops.

    Attributes:
        losses: what every cell costs against ``vanilla``.
        against: (layer, share) -> what the ranker gains over random choice; where nothing stays nobody chooses.
        by_layer: layer -> the same, mean of the shares. Empty where no share leaves a choice.
    """

    grid: Grid
    vanilla: Score
    scores: Mapping[Cell, Score]

    def pair(self, layer: int, share: float) -> tuple[Score, Score]:
        """By the ranker, and by random choice."""
        ours, random = (self.scores[self.grid.cell(layer, share, ranker)] for ranker in (self.grid.ranker, RANDOM))
        return ours, random

    @cached_property
    def losses(self) -> dict[Cell, Difference]:
        return {cell: Difference.of((self.vanilla, score)) for cell, score in self.scores.items()}

    @property
    def costs(self) -> Losses:
        """Points that drops by the ranker were measured to cost."""
        cells = {place: self.grid.cell(*place, self.grid.ranker) for place in self.grid.places}
        return Losses.of({place: self.losses[cell].value for place, cell in cells.items()})

    @cached_property
    def against(self) -> dict[tuple[int, float], Difference]:
        return {place: Difference.of(self.pair(*place)) for place in self.grid.places if place[1]}

    @cached_property
    def by_layer(self) -> dict[int, Difference]:
        shares = [share for share in self.grid.shares if share]
        return {
            layer: Difference.of(*(self.pair(layer, share) for share in shares)) for layer in self.grid.layers if shares
        }


def horizon(by_layer: Mapping[int, Difference]) -> int | None:
    """The first of the layers from which on the ranking is nowhere better than random choice (arXiv 2512.07580 calls it
    the information horizon); None: it is better at the last one."""
    found = None
    for layer in sorted(by_layer, reverse=True):
        if by_layer[layer].verdict == "better":
            break
        found = layer
    return found
