"""What a study measures: the score of a model that keeps only a share of its image tokens from one layer on, over
layers and shares, by a ranker and by random choice. (The paper's Figure 1 shows one ranker.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llava_pdrop.errors import UserError, check_name
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.schedule import Schedule

ATTENTION, RANDOM = "last_instruction", "random"
SHARES = (0.5, 0.25, 0.125, 0.0)
POINTS = 8
"""Layers that are measured at most, unless they are named."""


@dataclass(frozen=True)
class Cell:
    """A drop behind ``layer`` layers that leaves ``share`` of the image tokens, chosen by ``ranker``."""

    layer: int
    share: float
    ranker: str

    @property
    def name(self) -> str:
        """Of its answers."""
        return f"layer{self.layer}-keep{self.share:g}" + (f"-{self.ranker}" if self.share else "")

    def schedule(self, positions: Literal["auto", "renumber", "keep"] = "auto") -> Schedule:
        """What the model is asked with."""
        return Schedule((self.layer,), (self.share,), self.ranker, positions)


@dataclass(frozen=True)
class Grid:
    """The cells of a decoder of ``depth`` layers: ``layers`` rise, ``shares`` fall."""

    layers: tuple[int, ...]
    shares: tuple[float, ...]
    ranker: str
    depth: int

    @classmethod
    def of(
        cls,
        depth: int,
        layers: Sequence[int] = (),
        shares: Sequence[float] = SHARES,
        ranker: str = ATTENTION,
        first: int = 0,
    ) -> Grid:
        """The grid that was asked for.

        Args:
            depth: decoder layers.
            layers: where to drop; none: `POINTS` of them, evenly spread.
            first: the first layer before which this model may drop.

        Raises:
            UserError: a layer that there is not, a share that is none, a ranker that cannot be compared with chance.
        """
        check_name("--ranker", ranker, [name for name in RANKERS if name != RANDOM])
        first = max(first, int(RANKERS[ranker].looks_back))
        layers = layers or [max(1, first, place * depth // POINTS) for place in range(POINTS)]
        if wrong := [layer for layer in layers if not first <= layer < depth]:
            raise UserError(f"--layers {wrong[0]}: drops can come before layers {first} to {depth - 1} of this decoder")
        if beyond := [share for share in shares if not 0 <= share < 1]:
            raise UserError(f"--shares {beyond[0]:g}: give shares of the image tokens from 0 to below 1, such as 0.5")
        return cls(tuple(sorted(set(layers))), tuple(sorted(set(shares), reverse=True)), ranker, depth)

    @property
    def places(self) -> list[tuple[int, float]]:
        """Every layer with every share."""
        return [(layer, share) for layer in self.layers for share in self.shares]

    def cell(self, layer: int, share: float, ranker: str) -> Cell:
        """A cell of the grid. Where nothing stays nobody chooses: both rankers have one cell."""
        return Cell(layer, share, ranker if share else self.ranker)

    @property
    def cells(self) -> list[Cell]:
        """All cells, the deepest layer last."""
        found = [self.cell(*place, ranker) for place in self.places for ranker in (self.ranker, RANDOM)]
        return list(dict.fromkeys(found))
