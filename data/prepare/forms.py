"""Makes the "forms" data set: pages of printed letters and handwritten digits, as LLaVA JSON and PNG files.

A page is a grid of 12x12-pixel tiles. 26 *fields* lie on it: a printed letter and, in the tile to its right, a digit.
Half of the other tiles hold stray digits and pen marks. The question names a letter and ends in it ("Which digit is
written to the right of K"), the answer is its digit, so which image tokens survive decides whether it can be read.

The digits are real: the 8x8 scans of scikit-learn's ``load_digits``, by 13 writers. The page layout is composed here.
Training pages use scans 0..1399 only and evaluation pages scans 1415..1796 only. The scans are stored writer by writer
(the first labels of the set, 0..9 three times over, come again wherever a writer begins: at 1287, 1415 and 1667, say),
so the evaluation digits come from other hands than those trained on.

    python data/prepare/forms.py --out DIR [--seed 0] [--grid 16] [--train N] [--eval N] [--pretrain N] [--turns 8]
        [--workers 1]

writes to DIR (image paths in the JSON files are relative to DIR):
    pretrain.json   stage 1: all fields of a page as short questions ("Field K" -> "7")
    train.json      stage 2: ``--turns`` full questions per page
    eval.json       one full question per page, the answer as its gpt turn
    images/*.png    the pages
    manifest.json   arguments and counts; a second run with equal arguments finds it and does nothing
"""

from __future__ import annotations

import argparse
import functools
import json
import string
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FORMAT_VERSION = 2
"""Goes into the manifest: raise it when pictures or texts change, so that directories made before are remade."""

TILE = 12
"""Side of a tile in pixels; with a patch size of 12 every tile is one image token."""

FIRST_EVAL_SCAN = 1415
SCAN_COUNT = 1797
SCANS = {"train": range(1400), "eval": range(FIRST_EVAL_SCAN, SCAN_COUNT)}
"""Scan numbers of ``load_digits`` that pages of each kind may show; 1400..1414 belong to a writer trained on."""

LETTERS = string.ascii_uppercase
WORDS = (".", *string.digits, *LETTERS, "#")
"""What a tile can show: nothing, a digit, a letter, a pen mark. An index into this tuple is a tile's *word*."""

BLANK, MARK = 0, len(WORDS) - 1
FIRST_DIGIT, FIRST_LETTER = 1, 11

QUESTION = "Which digit is written to the right of {}"
SHORT_QUESTION = "Field {}"

_DIGIT_SHIFTS = [(dy, dx) for dy in (1, 2, 3) for dx in (1, 2, 3)]
_LETTER_STYLES = [(size, dy, dx) for size in (9, 10, 11) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
_MARK_COUNT = 64
_SPLIT_NUMBER = {"train": 0, "eval": 1, "pretrain": 2}


@dataclass(frozen=True)
class Page:
    """The drawing plan of one page.

    ``words`` (grid * grid,) word of every tile, row by row; ``scans`` (grid * grid,) number of the scan shown, -1 where
    the tile is no digit; ``fields`` letter -> digit.
    """

    grid: int
    words: np.ndarray
    scans: np.ndarray
    fields: dict[str, str]


@functools.cache
def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans of scikit-learn: images (1797, 8, 8) uint8 with values 0..255 (ink), labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("forms.py needs scikit-learn for the handwritten digits: pip install scikit-learn")
    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


@functools.cache
def _scans_by_label(split: str) -> list[np.ndarray]:
    labels = digit_scans()[1]
    allowed = np.asarray(SCANS[split])
    return [allowed[labels[allowed] == digit] for digit in range(10)]


@functools.cache
def _tile_bank() -> tuple[np.ndarray, int, int]:
    """Ink masks (N, 12, 12) uint8 of everything a tile can show, with the offsets of letters and of marks.

    Row 0 is the empty tile, then every scan in every shift, every letter in every style, and the pen marks.
    """
    scans = digit_scans()[0]
    digits = np.zeros((len(scans), len(_DIGIT_SHIFTS), TILE, TILE), np.uint8)
    for k, (dy, dx) in enumerate(_DIGIT_SHIFTS):
        digits[:, k, dy : dy + 8, dx : dx + 8] = scans
    letters = []
    fonts = {size: ImageFont.load_default(size) for size in {style[0] for style in _LETTER_STYLES}}
    for letter in LETTERS:
        for size, dy, dx in _LETTER_STYLES:
            tile = Image.new("L", (TILE, TILE))
            ImageDraw.Draw(tile).text((TILE / 2 + dx, TILE / 2 + dy), letter, fill=255, font=fonts[size], anchor="mm")
            letters.append(np.asarray(tile))
    marks, rng = [], np.random.default_rng(12)
    for _ in range(_MARK_COUNT):
        tile = Image.new("L", (TILE, TILE))
        pen = ImageDraw.Draw(tile)
        for _ in range(int(rng.integers(1, 4))):
            ends = [int(v) for v in rng.integers(0, TILE, 4)]
            if rng.random() < 0.5:
                pen.line(ends, fill=int(rng.integers(120, 256)))
            else:
                pen.point([int(v) for v in rng.integers(0, TILE, 8)], fill=int(rng.integers(120, 256)))
        marks.append(np.asarray(tile))
    digits = digits.reshape(-1, TILE, TILE)
    bank = np.concatenate([np.zeros((1, TILE, TILE), np.uint8), digits, np.stack(letters), np.stack(marks)])
    return bank, 1 + len(digits), 1 + len(digits) + len(letters)


def plan_page(
    rng: np.random.Generator, grid: int, split: str = "train", fields: int = len(LETTERS), clutter: float = 0.5
) -> Page:
    """Decides what every tile of a page shows.

    Args:
        split: ``train`` or ``eval``: which scans may be used.
        fields: number of different letters on the page.
        clutter: share of the tiles outside of fields that hold a stray digit (60 %) or a pen mark (40 %).
    """
    if grid * grid < 4 * fields or not 0 <= fields <= len(LETTERS):
        raise ValueError(f"{fields} fields do not fit on a page of {grid} x {grid} tiles")
    words = scatter_clutter(rng, grid, clutter)
    taken: set[int] = set()
    letters = rng.permutation(len(LETTERS))[:fields]
    starts = iter(rng.permutation(grid * grid).tolist())
    answers: dict[str, str] = {}
    for letter, digit in zip(letters.tolist(), rng.integers(0, 10, fields).tolist(), strict=True):
        start = next(s for s in starts if s % grid < grid - 1 and not {s, s + 1} & taken)
        taken |= {start, start + 1}
        words[start], words[start + 1] = FIRST_LETTER + letter, FIRST_DIGIT + digit
        answers[LETTERS[letter]] = str(digit)

    return Page(grid, words, choose_scans(rng, words, split), answers)


def scatter_clutter(rng: np.random.Generator, grid: int, clutter: float) -> np.ndarray:
    """Words (grid * grid,) of a page without fields: stray digits, pen marks and empty tiles (`plan_page`)."""
    words = np.full(grid * grid, BLANK, np.int64)
    other = rng.random(grid * grid)
    stray = rng.integers(0, 10, grid * grid)
    words[other < clutter] = MARK
    words[other < 0.6 * clutter] = FIRST_DIGIT + stray[other < 0.6 * clutter]
    return words


def choose_scans(rng: np.random.Generator, words: np.ndarray, split: str) -> np.ndarray:
    """Number of the scan that shows each digit among ``words``, -1 where there is none; same shape."""
    scans = np.full(len(words), -1, np.int64)
    pick = rng.random(len(words))
    for digit, pool in enumerate(_scans_by_label(split)):
        here = words == FIRST_DIGIT + digit
        scans[here] = pool[(pick[here] * len(pool)).astype(np.int64)]
    return scans


@dataclass(frozen=True)
class Task:
    """What is drawn and asked: this file's `FORMS`, and the chains of chains.py.

    ``plan(rng, grid, split)`` plans a page whose ``fields`` (so many) map the letter that ends a question to its
    answer; ``grid`` and ``counts`` are the defaults of the command line.
    """

    name: str
    plan: Callable[[np.random.Generator, int, str], Page]
    question: str
    short_question: str
    fields: int
    grid: int
    counts: dict[str, int]


FORMS = Task(
    "forms", plan_page, QUESTION, SHORT_QUESTION, len(LETTERS), 16, {"pretrain": 1280, "train": 1920, "eval": 500}
)


def draw_page(page: Page, rng: np.random.Generator) -> np.ndarray:
    """Draws a page: (12 * grid, 12 * grid, 3) uint8."""
    bank, first_letter, first_mark = _tile_bank()
    n, grid = page.grid * page.grid, page.grid
    style = rng.random(n)
    index = np.zeros(n, np.int64)
    digit, mark = page.scans >= 0, page.words == MARK
    letter = (page.words >= FIRST_LETTER) & ~mark
    index[digit] = 1 + page.scans[digit] * len(_DIGIT_SHIFTS) + (style[digit] * len(_DIGIT_SHIFTS)).astype(np.int64)
    styles = len(_LETTER_STYLES)
    index[letter] = first_letter + (page.words[letter] - FIRST_LETTER) * styles + (style[letter] * styles).astype(int)
    index[mark] = first_mark + (style[mark] * _MARK_COUNT).astype(np.int64)

    paper = rng.integers(205, 256, 3).astype(np.uint16)
    ink = rng.integers(0, 110, (n, 1, 1, 3)).astype(np.uint16)
    shade = (paper - ink) * bank[index][..., None].astype(np.uint16) // 255
    tiles = (paper - shade).astype(np.uint8)
    return tiles.reshape(grid, grid, TILE, TILE, 3).swapaxes(1, 2).reshape(grid * TILE, grid * TILE, 3)


def make_page(
    seed: int, split: str, number: int, grid: int, task: Task = FORMS
) -> tuple[Page, np.ndarray, np.random.Generator]:
    """Page ``number`` of a split with its picture, a pure function of the arguments, and the generator for its text."""
    rng = np.random.default_rng([seed, _SPLIT_NUMBER[split], number])
    page = task.plan(rng, grid, "eval" if split == "eval" else "train")
    return page, draw_page(page, rng), rng


def make_record(page: Page, rng: np.random.Generator, name: str, question: str, turns: int) -> dict:
    """A LLaVA record that asks for ``turns`` fields of a page, none of them twice."""
    asked = rng.permutation(sorted(page.fields))[:turns].tolist()
    conversations = []
    for i, letter in enumerate(asked):
        text = ("<image>\n" if i == 0 else "") + question.format(letter)
        conversations += [{"from": "human", "value": text}, {"from": "gpt", "value": page.fields[letter]}]
    return {"id": name, "image": f"images/{name}.png", "conversations": conversations}


def write_page(number: int, out: Path, seed: int, split: str, grid: int, turns: int, task: Task = FORMS) -> dict:
    """Draws page ``number`` of a split into a file and returns its record."""
    page, picture, rng = make_page(seed, split, number, grid, task)
    question = task.short_question if split == "pretrain" else task.question
    record = make_record(page, rng, f"{split}_{number:05d}", question, turns)
    Image.fromarray(picture).save(out / record["image"], compress_level=1)
    return record


def prepare(
    out: Path, seed: int, grid: int, counts: dict[str, int], turns: int, workers: int = 1, task: Task = FORMS
) -> bool:
    """Writes the data set into ``out``, the same with any number of ``workers`` (processes); returns False if it was
    there already."""
    manifest = {"format": FORMAT_VERSION, "seed": seed, "grid": grid, "turns": turns, "counts": counts}
    if task.name != FORMS.name:
        manifest["task"] = task.name
    path = out / "manifest.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == manifest:
        return False
    path.unlink(missing_ok=True)
    (out / "images").mkdir(parents=True, exist_ok=True)
    for split in counts:
        for stale in (out / "images").glob(f"{split}_*.png"):
            stale.unlink()
    asked = {"pretrain": task.fields, "train": turns, "eval": 1}
    for split, count in counts.items():
        write = functools.partial(write_page, out=out, seed=seed, split=split, grid=grid, turns=asked[split], task=task)
        if workers > 1:
            with ProcessPoolExecutor(workers) as pool:
                records = list(pool.map(write, range(count), chunksize=16))
        else:
            records = [write(number) for number in range(count)]
        (out / f"{split}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return True


def main(arguments: list[str] | None = None, task: Task = FORMS) -> None:
    """Command line: see the top of the file."""
    parser = argparse.ArgumentParser(
        description=f"Makes pages of printed letters and handwritten digits: the {task.name!r} data set."
    )
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", type=int, default=task.grid, help="tiles per side: 16 = 256 image tokens")
    parser.add_argument("--pretrain", type=int, default=task.counts["pretrain"], metavar="N", help="pages for stage 1")
    parser.add_argument("--train", type=int, default=task.counts["train"], metavar="N", help="pages for stage 2")
    parser.add_argument("--eval", type=int, default=task.counts["eval"], metavar="N", help="held-out pages")
    parser.add_argument("--turns", type=int, default=8, help="questions per training page")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: at least one process has to draw")
    if not 11 <= args.grid <= 64:
        parser.error(f"--grid {args.grid}: the fields need at least 11 tiles per side, at most 64 are possible")
    if not 1 <= args.turns <= task.fields:
        parser.error(f"--turns {args.turns}: a page has {task.fields} fields to ask for")
    if min(args.seed, args.pretrain, args.train, args.eval) < 0:
        parser.error("the seed and the numbers of pages cannot be negative")
    counts = {"pretrain": args.pretrain, "train": args.train, "eval": args.eval}
    try:
        made = prepare(args.out, args.seed, args.grid, counts, args.turns, args.workers, task)
    except OSError as error:
        sys.exit(f"{args.out}: cannot be written ({error.strerror})")
    what = ", ".join(f"{count} {split}" for split, count in counts.items())
    print(f"{args.out}: {what} pages of {args.grid * args.grid} tiles" + ("" if made else " (already there)"))


if __name__ == "__main__":
    main()
