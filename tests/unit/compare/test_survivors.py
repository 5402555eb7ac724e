"""Which patches a token shows, and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from llava_pdrop.compare.survivors import Sight, as_seen, shade, token_grid
from llava_pdrop.geometry import NEWLINE, ImageGeometry

PAD = ImageGeometry(48, 12)
ANYRES = ImageGeometry(48, 12, "anyres", "spatial_unpad", ((48, 96), (96, 48), (96, 96)))


def patch_grid(geometry: ImageGeometry, size: tuple[int, int], kept: Sequence[int], budget: int = 0) -> np.ndarray:
    return Sight(Image.new("RGB", (1, 1)), 12, token_grid(geometry, size, budget)).grid(kept)


def test_pad_tokens_are_patches_row_by_row():
    grid = patch_grid(PAD, (48, 48), [0, 5, 15])
    assert grid.shape == (4, 4) and np.argwhere(grid).tolist() == [[0, 0], [1, 1], [3, 3]]


@pytest.mark.parametrize("size", [(96, 96), (90, 40), (40, 90), (100, 70)])
def test_anyres_tokens_are_patches_of_the_canvas(size):
    """Every patch of the unpadded canvas has one token; the other tokens are the whole picture's and newlines."""
    index = ANYRES.merge_index(size)
    whole = patch_grid(ANYRES, size, range(len(index)))
    assert whole.sum() == ((index >= 16) & (index != NEWLINE)).sum()
    rows, columns = ANYRES.unpadded(size)
    assert whole[rows, columns].all()
    width, height = ANYRES.canvas(size)
    assert whole.shape == (height // 12, width // 12)
    assert as_seen(ANYRES, Image.new("RGB", size), (0.5, 0.5, 0.5)).size == (width, height)
    # the first token behind the whole picture is the top left patch of what is not padding
    assert patch_grid(ANYRES, size, [16])[rows.start, columns.start]
    assert not patch_grid(ANYRES, size, range(16)).any()


def test_a_pooled_token_shows_its_whole_cell():
    """4 cells of 2 by 2 patches; the first token of each cell stays."""
    assert PAD.pooled_index((48, 48), 4)[0].tolist() == [0, 2, 8, 10]
    assert patch_grid(PAD, (48, 48), [0, 2, 8, 10], 4).all()
    grid = patch_grid(PAD, (48, 48), [2], 4)
    assert np.argwhere(grid).tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert Sight(Image.new("RGB", (48, 48)), 12, token_grid(PAD, (48, 48), 4)).count([2, 8]) == 2


@pytest.mark.parametrize("size", [(96, 96), (90, 40), (40, 90), (100, 70)])
@pytest.mark.parametrize("budget", [4, 9, 10])
def test_pooled_tiles_have_no_hole(size, budget):
    """What stays of a pooled picture shows every patch that its tokens showed, and each token one cell of a tile."""
    stays = ANYRES.pooled_index(size, budget)[0]
    whole = patch_grid(ANYRES, size, range(ANYRES.num_tokens(size)))
    assert (patch_grid(ANYRES, size, stays, budget) == whole).all()
    token_RC = token_grid(ANYRES, size, budget)
    for token in set(token_RC[whole].tolist()):
        assert token in stays and 1 <= (token_RC == token).sum() <= 4
        rows, columns = np.nonzero(token_RC == token)
        assert len(set(rows // 4)) == len(set(columns // 4)) == 1, "in one tile"


def test_dropped_patches_are_dark_and_kept_ones_untouched():
    picture = np.full((4, 4, 3), (200, 100, 50), dtype=np.uint8)
    shown = shade(picture, np.asarray([[True, False], [False, True]]), patch=2)
    assert (shown[:2, :2] == picture[:2, :2]).all() and (shown[2:, 2:] == picture[2:, 2:]).all()
    assert (shown[:2, 2:] < 90).all() and len(np.unique(shown[:2, 2:])) == 1
