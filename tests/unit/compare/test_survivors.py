"""Which patches a token shows, and how they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from llava_pdrop.compare.survivors import as_seen, patch_grid, shade
from llava_pdrop.geometry import NEWLINE, ImageGeometry

PAD = ImageGeometry(48, 12)
ANYRES = ImageGeometry(48, 12, "anyres", "spatial_unpad", ((48, 96), (96, 48), (96, 96)))


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


def test_dropped_patches_are_dark_and_kept_ones_untouched():
    picture = np.full((4, 4, 3), (200, 100, 50), dtype=np.uint8)
    shown = shade(picture, np.asarray([[True, False], [False, True]]), patch=2)
    assert (shown[:2, :2] == picture[:2, :2]).all() and (shown[2:, 2:] == picture[2:, 2:]).all()
    assert (shown[:2, 2:] < 90).all() and len(np.unique(shown[:2, 2:])) == 1
