"""Pooled pictures, cell by cell and token by token, to compare ours with."""

from __future__ import annotations

from math import ceil, isqrt

import torch
from torch import Tensor

from llava_pdrop.geometry import NEWLINE, ImageGeometry


def slow_pooled(feature_IPW: Tensor, side: int) -> Tensor:
    """(tiles, patches, W) -> (tiles, side^2, W): the mean of all patches that a cell touches."""
    n = isqrt(feature_IPW.shape[1])
    spans = [range(cell * n // side, ceil((cell + 1) * n / side)) for cell in range(side)]
    cells = [[row * n + column for row in rows for column in columns] for rows in spans for columns in spans]
    return torch.stack([feature_IPW[:, cell].mean(1) for cell in cells], dim=1)


def slow_tokens(geometry: ImageGeometry, size: tuple[int, int], side: int) -> list[tuple[int, int]]:
    """Of every token of a picture that stays its place and its pooled feature (`NEWLINE`): the first token of a cell,
    and the newline of a row that has one."""
    n, found, seen, shows = geometry.patches_per_side, [], set[tuple[int, int]](), False
    for token, feature in enumerate(geometry.merge_index(size).tolist()):
        if feature == NEWLINE:
            found += [(token, NEWLINE)] * shows
            shows = False
            continue
        tile, patch = divmod(feature, n * n)
        cell = (patch // n * side // n) * side + patch % n * side // n
        if (tile, cell) not in seen:
            seen.add((tile, cell))
            found.append((token, tile * side**2 + cell))
            shows = shows or tile > 0
    return found
