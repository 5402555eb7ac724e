"""Pictures of a prompt whose tiles stand between marks, as the tokenizers of SmolVLM and Idefics3 spell them."""

from __future__ import annotations

import numpy as np
import pytest

from llava_pdrop.generate.families import ATTACHABLE
from llava_pdrop.generate.pictures import Shown, pictures_of
from tests.messages import says

IMAGE, FAKE = 9, 8
ONE_TOKEN = {"tile 1": [21], "tile 2": [22], "whole": [23]}
SEVERAL = {"tile 1": [30, 31, 33, 34], "tile 2": [30, 32, 33, 34], "whole": [30, 35, 34]}  # as <row_1_col_1> in letters
CUT, WHOLE = ("tile 1", "tile 2", "whole"), ("whole",)


def picture(spelled: dict[str, list[int]], tags: tuple[str, ...]) -> list[int]:
    """Two tokens per tile behind its mark and its tag, a line feed before the whole picture, a mark at the end."""
    ids = []
    for tag in tags:
        ids += [*([3] if tag == "whole" and tags != WHOLE else []), FAKE, *spelled[tag], IMAGE, IMAGE]
    return [*ids, FAKE]


def numbers(*rows: list[int]) -> list[list[int]]:
    """Of every placeholder, by row; padded on the left."""
    longest = max(map(len, rows))
    ids, real = (np.array([[filler] * (longest - len(row)) + each for row, each in zip(rows, lines)])
                 for filler, lines in ((0, rows), (False, [[True] * len(row) for row in rows])))  # fmt: skip
    found = pictures_of(ids, real, ATTACHABLE["smolvlm"], IMAGE, None, Shown())
    return [row[row >= 0].tolist() for row in found]


@pytest.mark.parametrize("spelled", [ONE_TOKEN, SEVERAL], ids=["one token", "several"])
def test_tiles_are_told_by_their_tags(spelled):
    cut, whole = picture(spelled, CUT), picture(spelled, WHOLE)
    assert numbers([1, *cut, 40]) == [[0] * 6]
    assert numbers([1, *cut, *cut, *whole, 40]) == [[0] * 6 + [1] * 6 + [2] * 2]
    assert numbers([1, *whole, 40, *cut, 41], [1, 40], [*whole, *whole]) == [[0] * 2 + [1] * 6, [], [2] * 2 + [3] * 2]


def test_runs_without_marks_are_refused():
    assert numbers([1, IMAGE, IMAGE, 40]) == [[0, 0]]
    with pytest.raises(ValueError, match=says("images", "row 1", "2 runs")):
        numbers([1, 40], [1, IMAGE, IMAGE, 40, IMAGE, 41])
