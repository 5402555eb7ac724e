"""How a picture becomes image tokens: tiles, unpadding, newlines. Arithmetic only, no pixels, no model.

The data side (how many placeholders?) and the model side (which feature goes where?) both ask this file, so they
cannot disagree. Source of the rules: `llava/mm_utils.py` and `llava/model/llava_arch.py` of LLaVA 1.2, as observed in
golden/README section 4, points 11 and 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Literal

import numpy as np

from llava_pdrop.errors import UserError, check_name

ASPECTS, MERGES, ROUNDINGS = ("pad", "anyres"), ("flat", "spatial", "spatial_unpad"), ("original", "hf")

Size = tuple[int, int]
"""(width, height) of a picture in pixels."""

NEWLINE = -1
"""Entry of `ImageGeometry.merge_index` that stands for the learned ``image_newline`` vector."""

PINPOINTS: dict[str, tuple[tuple[int, int], ...]] = {
    "5_tiles": ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    "9_tiles": tuple((336 * w, 336 * h) for w in range(1, 9) for h in range(1, 9) if 1 < w * h <= 8),
}
"""Canvases (width, height) by the name of their set, for towers of 336 pixels; a new set is one row. ``5_tiles`` are
those of LLaVA-NeXT: at most 4 tiles plus the whole picture (the paper's 2,880 tokens). ``9_tiles`` are all canvases of
2 to 8 tiles, so that the whole picture makes at most 9: the paper's larger setting (5,184 tokens). Which canvases the
authors used is published nowhere; taking all of them is our choice."""


@dataclass(frozen=True)
class ImageGeometry:
    """Tiling and merging rules of one model.

    Attributes:
        tile: side of a tile in pixels (the tower's input size).
        patch: side of a patch in pixels.
        aspect: ``pad`` (one square tile, LLaVA-1.5) or ``anyres`` (whole picture plus a grid of tiles, LLaVA-NeXT).
        merge: ``flat`` (all patches in order), ``spatial`` (tiles merged to one grid) or ``spatial_unpad`` (the same
            without padding and with a newline per row).
        pinpoints: allowed anyres canvases as (width, height), in order of preference for ties.
        rounding: ``original`` truncates the unpadded size as LLaVA does, ``hf`` rounds it as newer transformers do;
            they differ by one row or column on rare sizes such as 88x55.

    Raises:
        UserError: the tile is no multiple of the patch, anyres without canvases, or a canvas that is not made of whole
            tiles.
    """

    tile: int
    patch: int
    aspect: Literal["pad", "anyres"] = "pad"
    merge: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    pinpoints: tuple[tuple[int, int], ...] = ()
    rounding: Literal["original", "hf"] = "original"

    def __post_init__(self) -> None:
        for name, known in (("aspect", ASPECTS), ("merge", MERGES), ("rounding", ROUNDINGS)):
            check_name(f"image {name}", getattr(self, name), known)
        if self.tile % self.patch:
            raise UserError(f"a tile of {self.tile} pixels is not a whole number of {self.patch}-pixel patches")
        if self.aspect == "anyres" and not self.pinpoints:
            raise UserError("image aspect 'anyres' needs pinpoints, a list of canvas sizes (width, height)")
        for size in self.pinpoints:
            if len(size) != 2 or any(side < self.tile or side % self.tile for side in size):
                words = "x".join(map(str, size))
                raise UserError(f"pinpoint {words}: width and height must be multiples of the tile size {self.tile}")

    @property
    def patches_per_side(self) -> int:
        return self.tile // self.patch

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return self.patches_per_side**2

    def side(self, budget: int) -> int:
        """Features along a side of a tile that is pooled to the largest square grid of at most ``budget`` (0: it is not
        pooled)."""
        return min(self.patches_per_side, isqrt(budget)) if budget else self.patches_per_side

    def features(self, budget: int) -> int:
        """Features of one tile that is pooled so."""
        return self.side(budget) ** 2

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) a picture of ``size`` (width, height) is fitted into: the canvas that keeps the most
        of its pixels, then wastes the least."""
        if self.aspect == "pad":
            return self.tile, self.tile
        width, height = size

        def fit(candidate: tuple[int, int]) -> tuple[int, int]:
            scale = min(candidate[0] / width, candidate[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - candidate[0] * candidate[1]

        return max(self.pinpoints, key=fit)

    def num_tiles(self, size: tuple[int, int]) -> int:
        """Tiles that go through the tower for a picture of ``size`` (width, height), the whole picture included."""
        if self.aspect == "pad":
            return 1
        width, height = self.canvas(size)
        return 1 + (width // self.tile) * (height // self.tile)

    def num_tokens(self, size: tuple[int, int], budget: int = 0) -> int:
        """Image tokens of a picture of ``size`` (width, height): the length of its `merge_index`, without making it;
        of a picture that is pooled to ``budget`` features a tile the length of its `pooled_index`."""
        if self.features(budget) < self.patches:
            return len(self.pooled_index(size, budget)[0])
        if self.aspect == "pad" or self.merge != "spatial_unpad":
            return self.num_tiles(size) * self.patches
        columns, rows = (length // self.patch for length in self.canvas(size))
        row, column = self.unpadded(size)
        return self.patches + len(range(rows)[row]) * (len(range(columns)[column]) + 1)

    def unpadded(self, size: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the merged patch grid that show the picture and not its padding."""
        canvas_w, canvas_h = self.canvas(size)
        columns, rows = canvas_w // self.patch, canvas_h // self.patch
        width, height = size
        if width / height > columns / rows:
            cut = (rows - self._round(height * (columns / width))) // 2
            return slice(cut, rows - cut), slice(0, columns)
        cut = (columns - self._round(width * (rows / height))) // 2
        return slice(0, rows), slice(cut, columns - cut)

    def merge_index(self, size: tuple[int, int]) -> np.ndarray:
        """Which feature each image token takes: (tokens,) int64 indices into the picture's features
        (tiles * patches, D), tile 0 being the whole picture and the others row-major; `NEWLINE` for a newline."""
        return _merge_index(self, size)

    def pooled_index(self, size: tuple[int, int], budget: int) -> tuple[np.ndarray, np.ndarray]:
        """Of a picture whose tiles are pooled to at most ``budget`` features each: which of its tokens (`merge_index`)
        stay, (tokens,) int64, and which pooled feature each of them takes, `NEWLINE` for a newline.

        The first token of every cell stays, and the newline of every row in which one does. So a cell that shows any of
        the picture is a token, and nothing has to be rounded once more.
        """
        return _pooled_index(self, size, self.side(budget))

    def cell_of_patch(self, side: int) -> np.ndarray:
        """(patches,) int64: the cell of a grid of ``side`` by ``side`` that each patch of a tile lies in."""
        cell = np.arange(self.patches_per_side) * side // self.patches_per_side
        return (cell[:, None] * side + cell).reshape(-1)

    def _round(self, value: float) -> int:
        return int(value) if self.rounding == "original" else int(round(value, 7))


@lru_cache(maxsize=4096)
def _merge_index(geometry: ImageGeometry, size: tuple[int, int]) -> np.ndarray:
    side, patches = geometry.patches_per_side, geometry.patches
    base = np.arange(patches)
    if geometry.aspect == "pad":
        return base
    grid_w, grid_h = (length // geometry.tile for length in geometry.canvas(size))
    tiles = np.arange(patches, (1 + grid_w * grid_h) * patches)
    if geometry.merge == "flat":
        return np.concatenate([base, tiles])
    grid = tiles.reshape(grid_h, grid_w, side, side).transpose(0, 2, 1, 3).reshape(grid_h * side, grid_w * side)
    if geometry.merge == "spatial_unpad":
        rows, columns = geometry.unpadded(size)
        grid = grid[rows, columns]
        grid = np.concatenate([grid, np.full((len(grid), 1), NEWLINE)], axis=1)
    return np.concatenate([base, grid.reshape(-1)])


@lru_cache(maxsize=4096)
def _pooled_index(geometry: ImageGeometry, size: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    index = geometry.merge_index(size)
    if side == geometry.patches_per_side:
        return np.arange(len(index)), index
    tile, patch = np.divmod(index, geometry.patches)
    feature = np.where(index == NEWLINE, NEWLINE, tile * side**2 + geometry.cell_of_patch(side)[patch])
    stays = np.zeros(len(index), dtype=bool)
    stays[np.unique(feature, return_index=True)[1]] = True
    newlines = int((index == NEWLINE).sum())
    if newlines:
        rows = stays[geometry.patches :].reshape(newlines, -1)
        rows[:, -1] = rows[:, :-1].any(1)
    return np.flatnonzero(stays), feature[stays]
