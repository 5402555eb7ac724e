"""Tiling arithmetic against every size recorded from the official code, and at its extremes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from llava_pdrop.geometry import NEWLINE, PAPER_PINPOINTS_5_TILES, ImageGeometry
from tests.golden.cases import directories

RECORDED = [file for directory in directories() if (file := directory / "preprocess" / "geometry.json").is_file()]
ANYRES = ImageGeometry(336, 14, "anyres", "spatial_unpad", PAPER_PINPOINTS_5_TILES)
SIZES = [(1, 1), (1, 10000), (10000, 1), (336, 336), (337, 335), (20000, 20000), (640, 480), (3, 4000)]


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.parents[1].name)
@pytest.mark.parametrize("model", ["real", "tiny"])
def test_every_recorded_size(file, model):
    recorded = json.loads(file.read_text())[model]
    tile, pinpoints = recorded["tile"], tuple(map(tuple, recorded["pinpoints"]))
    geometry = ImageGeometry(tile, tile // recorded["patches_per_side"], "anyres", "spatial_unpad", pinpoints)
    assert recorded["items"]
    for item in recorded["items"]:
        size = tuple(item["size_wh"])
        canvas = geometry.canvas(size)
        rows, columns = geometry.unpadded(size)
        assert list(canvas) == item["best_resolution_wh"], size
        assert (canvas[0] // tile, canvas[1] // tile) == (item["grid_w"], item["grid_h"]), size
        assert geometry.num_tiles(size) == item["n_tiles_incl_base"], size
        assert rows.stop - rows.start == item["unpadded_rows"], size
        assert columns.stop - columns.start == item["unpadded_cols"], size
        if "first_row" in item:  # not where nothing of the grid is left
            assert (rows.start, columns.start) == (item["first_row"], item["first_col"]), size
        for merge in ("spatial_unpad", "spatial", "flat"):
            assert replace(geometry, merge=merge).num_tokens(size) == item[f"n_image_tokens_{merge}"], (size, merge)


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", SIZES)
def test_merging_shows_every_feature_at_most_once(size, merge):
    geometry = replace(ANYRES, merge=merge)
    index = geometry.merge_index(size)
    shown = index[index != NEWLINE]
    features = geometry.num_tiles(size) * geometry.patches
    assert len(np.unique(shown)) == len(shown) and shown.min() == 0 and shown.max() < features
    assert index[: geometry.patches].tolist() == list(range(geometry.patches))
    if merge == "spatial_unpad":
        rows, columns = geometry.unpadded(size)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        assert (index == NEWLINE).sum() == height
        assert len(shown) == geometry.patches + height * width
    else:
        assert sorted(shown.tolist()) == list(range(features))
