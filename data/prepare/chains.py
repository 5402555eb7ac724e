"""Makes the "chains" data set: pages on which a question is answered in two hops, as LLaVA JSON and PNG files.

Tiles, scans and drawing are those of forms.py. Twelve letters of a page, its *keys*, have another letter to their right
("K M"). Each of these twelve *middles* stands at a second place too, with a digit to its right ("M 7"). The question
ends in a key ("Which digit is at the end of the path from K"): find K, read M, find the other M, read 7. So two places
of the page have to survive until they are read, and where the second one lies is not known before the first is read.

    python data/prepare/chains.py --out DIR [--seed 0] [--grid 12] [--train N] [--eval N] [--pretrain N] [--turns 8]
        [--workers 1]

writes to DIR what forms.py writes (see there): stage 1 asks for all keys of a page in short ("Path K" -> "7").
"""

from __future__ import annotations

from dataclasses import dataclass

import forms
import numpy as np

PAIRS = 12
"""Keys of a page. No letter is a key and a middle of one page, so that 24 of the 26 letters are on it."""


@dataclass(frozen=True)
class Chains(forms.Page):
    """A page, with ``fields`` key -> digit at the end of its path, and for each of these, in order:

    ``keys`` and ``middles`` (pairs,) numbers of the letters in the alphabet; ``firsts`` (pairs,) tile of the middle
    beside its key; ``seconds`` (pairs,) tile of the digit.
    """

    keys: np.ndarray
    middles: np.ndarray
    firsts: np.ndarray
    seconds: np.ndarray


def plan_page(
    rng: np.random.Generator, grid: int, split: str = "train", pairs: int = PAIRS, clutter: float = 0.5
) -> Chains:
    """Decides what every tile of a page shows.

    Args:
        split: ``train`` or ``eval``: which scans may be used.
        pairs: number of different keys on the page.
        clutter: share of the tiles outside of fields that hold a stray digit (60 %) or a pen mark (40 %).

    Raises:
        ValueError: the page is too small for so many fields.
    """
    if not 0 <= 2 * pairs <= len(forms.LETTERS) or grid * (grid - 2) < 8 * pairs:
        raise ValueError(f"{pairs} paths do not fit on a page of {grid} x {grid} tiles")
    words = forms.scatter_clutter(rng, grid, clutter)
    letters = rng.permutation(len(forms.LETTERS))[: 2 * pairs]
    keys, middles = letters[:pairs], letters[pairs:]
    digits = rng.integers(0, 10, pairs)
    free = np.ones(grid * grid, bool)
    starts = rng.permutation(grid * grid).tolist()

    def place(left: int, right: int, width: int) -> int:
        start = next(s for s in starts if s % grid <= grid - width and free[s : s + width].all())
        free[start : start + width] = False
        words[start : start + 2] = left, right
        return start + 1

    # A digit to the right of "K M" would make it a field of M, so a third tile is kept free of them
    firsts = [place(forms.FIRST_LETTER + k, forms.FIRST_LETTER + m, 3) for k, m in zip(keys, middles, strict=True)]
    for behind in (first + 1 for first in firsts):
        words[behind] = forms.MARK if words[behind] == forms.MARK else forms.BLANK
    seconds = [place(forms.FIRST_LETTER + m, forms.FIRST_DIGIT + d, 2) for m, d in zip(middles, digits, strict=True)]
    answers = {forms.LETTERS[key]: str(digit) for key, digit in zip(keys, digits, strict=True)}
    scans = forms.choose_scans(rng, words, split)
    return Chains(grid, words, scans, answers, keys, middles, np.array(firsts, int), np.array(seconds, int))


TASK = forms.Task(
    name="chains",
    plan=plan_page,
    question="Which digit is at the end of the path from {}",
    short_question="Path {}",
    fields=PAIRS,
    grid=12,
    counts={"pretrain": 960, "train": 960, "eval": 500},
)


if __name__ == "__main__":
    forms.main(task=TASK)
