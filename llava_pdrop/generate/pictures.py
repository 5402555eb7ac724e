"""Which tokens of a prompt belong to which picture.

The budget is counted per picture, ``int(n * ratio)`` of its n tokens, so pictures have to be told apart: by the
features that the model itself made of them, or where a feature is a tile, by the marks between the placeholders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from llava_pdrop.errors import UserError
from llava_pdrop.generate.families import Family

Lengths = list[int] | None
"""Tokens of every entry of a list of features; None: not known."""


@dataclass
class Shown:
    """What the encoders of a model have made for one prompt: tokens of every entry of their output, in order; and how
    many ``frames`` a clip has."""

    image: Lengths = None
    video: Lengths = None
    frames: int | None = None

    def noting(self, name: str, output: Any) -> Shown:
        """The same with what the encoder of ``name``, image or video, returned."""
        lengths = entry_lengths(output)
        return replace(self, image=lengths) if name == "image" else replace(self, video=lengths)


def entry_lengths(output: Any) -> Lengths:
    """Tokens of every entry of what ``get_image_features`` or ``get_video_features`` returned."""
    entries = getattr(output, "pooler_output", output)
    if (isinstance(entries, Tensor) and entries.ndim < 3) or entries is None:
        return None  # one row of features after another: nothing tells where a picture ends
    if not all(isinstance(entry, Tensor) for entry in entries):
        return None
    return [math.prod(entry.shape[:-1]) for entry in entries]


def pictures_of(
    ids_BN: np.ndarray, real_BN: np.ndarray, family: Family, image: int | None, video: int | None, shown: Shown
) -> np.ndarray:
    """Number of the picture (B, N) int64 that every token belongs to, -1 for text; pictures are numbered in the order
    in which they begin, row after row. A clip counts as a picture.

    Args:
        ids_BN: input ids (B, N).
        real_BN: (B, N) bool, False at the padding.
        image, video: the placeholders' ids; None: the class has none.

    Raises:
        UserError: features and placeholders do not fit, or nothing tells the pictures apart.
    """
    number_BN = np.full(ids_BN.shape, -1)
    kinds = [("image", image, family.unit, shown.image), ("video", video, family.clip, shown.video)]
    if family.shared:  # one placeholder for both: whichever the model was shown
        kinds = [kinds[0] if shown.image is not None else ("video", image, family.clip, shown.video)]
    for name, token, unit, lengths in kinds:
        if token is None or not (place_BN := (ids_BN == token) & real_BN).any():
            continue
        if unit is None:
            raise UserError(f"attach() knows no {name}s of this class of models: leave them out, or detach(model)")
        if unit == "frames" and lengths is not None:
            lengths = _clips(lengths, shown.frames)
        found_P = UNITS[unit](name, ids_BN, real_BN, place_BN, lengths)
        number_BN[place_BN] = found_P + number_BN.max() + 1
    return _in_order(number_BN)


def _in_order(number_BN: np.ndarray) -> np.ndarray:
    """The numbers of ``number_BN`` exchanged for 0, 1, 2, ... in order of appearance."""
    rows, columns = np.nonzero(number_BN >= 0)
    _, first, inverse = np.unique(number_BN[rows, columns], return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[first.argsort()] = np.arange(len(first))
    number_BN[rows, columns] = order[inverse]
    row_of = rows[first]
    if (rows != row_of[inverse]).any():
        row = int(rows[rows != row_of[inverse]][0])
        raise UserError(
            f"the placeholders of row {row} are not those of whole pictures: the pictures are not in the order of the "
            "rows (where transformers repeats the pictures of a row for its beams or samples one by one, give one row "
            "at a time, or pictures of one size)"
        )
    return number_BN


def _by_feature(
    name: str, ids_BN: np.ndarray, real_BN: np.ndarray, place_BN: np.ndarray, lengths: Lengths
) -> np.ndarray:
    """Every feature map is a picture: the placeholders are its tokens, whatever stands between them."""
    if lengths is None:
        raise UserError(f"attach() cannot tell how many tokens each {name} of the prompt has: its features do not say")
    places = int(place_BN.sum())
    if places != sum(lengths):
        raise UserError(f"the prompt has {places} {name} placeholders, but its {name}s have {sum(lengths)} tokens")
    return np.repeat(np.arange(len(lengths)), lengths)


def _by_run(name: str, ids_BN: np.ndarray, real_BN: np.ndarray, place_BN: np.ndarray, lengths: Lengths) -> np.ndarray:
    """Every run of placeholders without another token in it is a picture."""
    return np.concatenate(
        [np.repeat(np.arange(len(runs)) + first, runs) for first, runs in _rows_of(place_BN, real_BN)]
    )


def _by_run_of_one(
    name: str, ids_BN: np.ndarray, real_BN: np.ndarray, place_BN: np.ndarray, lengths: Lengths
) -> np.ndarray:
    """A run is a picture if there are as many runs as feature maps; else they may be tiles of one, or pictures."""
    runs = [length for _, row in _rows_of(place_BN, real_BN) for length in row]
    if lengths is None or runs != lengths:
        held = "of unknown length" if lengths is None else f"of {len(lengths)} feature maps"
        raise UserError(
            f"attach() cannot tell the {name}s of this prompt apart: {len(runs)} runs of placeholders hold {name}s "
            f"{held}. Put text between them, and do not split them into crops"
        )
    return _by_run(name, ids_BN, real_BN, place_BN, lengths)


def _by_marks(name: str, ids_BN: np.ndarray, real_BN: np.ndarray, place_BN: np.ndarray, lengths: Lengths) -> np.ndarray:
    """Every run stands behind a mark and a tag of one or several tokens. The tiles of a picture have tags of their own,
    the whole picture comes last, behind the tag that the last run of the row has."""
    numbers, following = [], 0
    for row, (_, runs) in enumerate(_rows_of(place_BN, real_BN)):
        ids_N, place_N = ids_BN[row][real_BN[row]], place_BN[row][real_BN[row]]
        tags = _tags(ids_N, *_edges(place_N))
        if len(runs) > 1 and None in tags:
            raise UserError(
                f"attach() cannot tell the {name}s of row {row} apart: not all of its {len(runs)} runs of placeholders "
                "have the marks of this class of models around them"
            )
        for tag, length in zip(tags, runs):
            numbers.append(np.full(length, following))
            if tag == tags[-1]:
                following += 1
    return np.concatenate(numbers)


def _tags(ids_N: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> list[tuple[int, ...] | None]:
    """What stands between every run and the last mark before it; None: no mark since the run before. The mark is the
    token behind the last run."""
    tags: list[tuple[int, ...] | None] = []
    behind_N = np.append(ids_N, -1)
    for start, stop in zip(starts, (0, *stops)):
        marks = np.flatnonzero(ids_N[stop:start] == behind_N[stops[-1]])
        tags.append(tuple(ids_N[stop + marks[-1] + 1 : start].tolist()) if len(marks) else None)
    return tags


UNITS: dict[str, Callable[[str, np.ndarray, np.ndarray, np.ndarray, Lengths], np.ndarray]] = {
    "feature": _by_feature,
    "frames": _by_feature,
    "run": _by_run,
    "apart": _by_run_of_one,
    "marks": _by_marks,
}
"""How placeholders are cut into pictures: numbers (P,) of the P placeholders, row after row."""


def _clips(lengths: Sequence[int], frames: int | None) -> Lengths:
    """Tokens of every clip, given those of every frame."""
    if not frames or len(lengths) % frames:
        return None
    return [sum(lengths[start : start + frames]) for start in range(0, len(lengths), frames)]


def _edges(place_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last index of every run of True."""
    edges = np.flatnonzero(np.diff(place_N, prepend=False, append=False))
    return edges[::2], edges[1::2]


def _rows_of(place_BN: np.ndarray, real_BN: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """For every row, how many runs come before it and the length of each of its own."""
    rows, first = [], 0
    for place_N, real_N in zip(place_BN, real_BN):
        starts, stops = _edges(place_N[real_N])
        rows.append((first, stops - starts))
        first += len(starts)
    return rows


def check_prompt(picture_BN: np.ndarray, real_BN: np.ndarray, cached: bool, renumber: bool) -> None:
    """Refuses a prompt that would be ranked or numbered wrongly.

    Args:
        picture_BN: number of the picture of every token, -1 for text.
        real_BN: False at the padding.
        cached: whether the caller keeps its keys and values, to go on with later.
        renumber: whether positions are numbered anew.

    Raises:
        UserError: a row is cached before its question, or its mask has holes.
    """
    begins_BN = real_BN & ~np.pad(real_BN, ((0, 0), (1, 0)))[:, :-1]
    if renumber and (begins_BN.sum(1) > 1).any():
        raise UserError(
            "pyramid_drop.positions: renumber would close the holes that attention_mask leaves between tokens: set "
            "'keep', or pad at the ends only"
        )
    for row, (picture_N, real_N) in enumerate(zip(picture_BN, real_BN)):
        if cached and picture_N[real_N][-1:].max(initial=-1) >= 0:
            raise UserError(
                f"attach() ranks image tokens by the end of the prompt, but row {row} is cached with its image at the "
                "end: give the question with it, or generate at once"
            )
