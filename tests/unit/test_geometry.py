"""Tiling arithmetic at its extremes, its two roundings and the named canvas sets. (Every size recorded from the
official code: tests/golden/test_preprocess.py.)"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llava_pdrop.config.load import load_config
from llava_pdrop.errors import ConfigError
from llava_pdrop.geometry import NEWLINE, PINPOINTS, ImageGeometry
from tests.messages import meant, says
from tests.parity.test_export import sources  # noqa: F401
from tests.slow_pooling import slow_tokens

ROOT = Path(__file__).parents[2]
NEXT = ROOT / "configs" / "llava_next_7b" / "finetune.yaml"
ANYRES = ImageGeometry(336, 14, "anyres", "spatial_unpad", PINPOINTS["5_tiles"])
SIZES = [(1, 1), (1, 10000), (10000, 1), (336, 336), (337, 335), (20000, 20000), (640, 480), (3, 4000)]


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


@pytest.mark.parametrize(
    ("size", "original", "hf"), [((88, 55), 926, 976), ((328, 205), 926, 976), ((640, 480), 2340, 2340)]
)
def test_the_two_roundings(size, original, hf):
    assert ANYRES.num_tokens(size) == original
    assert replace(ANYRES, rounding="hf").num_tokens(size) == hf


def test_the_largest_pictures_of_the_paper():
    """2,880 and 5,184 image tokens (576 per tile), where nothing is unpadded and no newline added."""
    flat = replace(ANYRES, merge="flat")
    assert flat.num_tokens((672, 672)) == 2880
    nine = replace(flat, pinpoints=PINPOINTS["9_tiles"])
    assert nine.num_tokens((672, 1344)) == nine.num_tokens((2688, 336)) == 5184
    assert max(nine.num_tiles(size) for size in PINPOINTS["9_tiles"]) == 9
    assert set(PINPOINTS["5_tiles"]) < set(PINPOINTS["9_tiles"]) and len(set(PINPOINTS["9_tiles"])) == 19


@pytest.mark.parametrize("budget", [1, 5, 144, 270, 575])
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", SIZES)
def test_pooling_leaves_the_first_token_of_every_cell(size, merge, budget):
    geometry = replace(ANYRES, merge=merge)
    rows, feature = geometry.pooled_index(size, budget)
    side = geometry.side(budget)
    assert side**2 <= budget < (side + 1) ** 2
    assert list(zip(rows.tolist(), feature.tolist())) == slow_tokens(geometry, size, side)
    assert geometry.num_tokens(size, budget) == len(rows)
    if merge != "spatial_unpad":
        assert sorted(feature.tolist()) == list(range(geometry.num_tiles(size) * geometry.features(budget)))


@pytest.mark.parametrize("budget", [0, 576, 600])
def test_pooling_to_all_features_leaves_every_token(budget):
    rows, feature = ANYRES.pooled_index((640, 480), budget)
    assert rows.tolist() == list(range(ANYRES.num_tokens((640, 480)))) and ANYRES.features(budget) == 576
    assert np.array_equal(feature, ANYRES.merge_index((640, 480)))
    assert ANYRES.num_tokens((640, 480), budget) == len(rows)


def test_a_new_pinpoint_set_is_one_row(monkeypatch):
    monkeypatch.setitem(PINPOINTS, "wide", ((672, 336), (1344, 336)))
    config = load_config(NEXT, ["model.pinpoints=wide"])
    assert config.model.pinpoints == ((672, 336), (1344, 336))
    geometry = replace(ANYRES, pinpoints=config.model.pinpoints)
    assert geometry.canvas((1000, 200)) == (1344, 336) and geometry.num_tiles((1000, 200)) == 5


def test_pinpoints_by_name():
    assert load_config(NEXT, ["model.pinpoints=5_tiles"]).model.pinpoints == PINPOINTS["5_tiles"]
    with pytest.raises(ConfigError, match=says("'9_tile'", "['5_tiles', '9_tiles']", meant("9_tiles'"))):
        load_config(NEXT, ["model.pinpoints=9_tile"])


@pytest.mark.parametrize("aspect", ["pad", "anyres"])
@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("rounding", ["original", "hf"])
def test_tokens_are_counted_without_laying_them_out(aspect: str, merge: str, rounding: str) -> None:
    geometry = ImageGeometry(56, 14, aspect, merge, ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168)), rounding)
    sizes = [(w, h) for w in (1, 7, 55, 56, 88, 110, 176, 352, 1000) for h in (1, 9, 55, 56, 99, 110, 836, 1000)]
    assert [geometry.num_tokens(size) for size in sizes] == [len(geometry.merge_index(size)) for size in sizes]


@pytest.mark.parametrize("pinpoint", [(336, 500), (0, 336), (-336, 336), (336,), (336, 336, 336)])
def test_pinpoints_that_are_no_canvas(pinpoint: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=says("x".join(map(str, pinpoint)), "multiples")):
        replace(ANYRES, pinpoints=(pinpoint,))


def test_anyres_without_pinpoints() -> None:
    with pytest.raises(ValueError, match="needs pinpoints"):
        replace(ANYRES, pinpoints=())


@pytest.mark.parametrize("setting", [{"aspect": "square"}, {"merge": "maxpool"}, {"rounding": "up"}])
def test_unknown_image_settings(setting):
    (name,) = setting
    with pytest.raises(ValueError, match="^" + says(f"image {name}", setting[name])):
        ImageGeometry(28, 7, **setting)
