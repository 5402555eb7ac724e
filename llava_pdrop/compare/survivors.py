"""Which patches of a picture keep their image token through the drops, and the picture of it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from llava_pdrop.data.images import fit_to_canvas, load_image, pad_to_square
from llava_pdrop.eval.evaluate import AnswerSettings, Result, answer
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import LlavaRespondent
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.geometry import NEWLINE, ImageGeometry
from llava_pdrop.report.pictures import GRID, INK, subplots
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import ImageSource


@dataclass(frozen=True)
class Example:
    """A question with its picture (as the tower sees it, ``patch`` pixels per patch) and, for every stage, which
    patches (rows, columns) still have their image token, how many image ``tokens`` are there, and how many of these are
    ``drawn`` (a pooled one shows several patches; newlines and the whole picture beside its tiles show none). ``gold``
    is empty where nobody knows the answer."""

    question: str
    gold: str
    answer: str
    picture: Image.Image
    patch: int
    kept: list[np.ndarray]
    tokens: list[int]
    drawn: list[int]


@dataclass(frozen=True)
class Sight:
    """A ``picture`` as a model sees it, ``patch`` pixels per patch, and the number of the image token that shows each
    patch, ``token_RC`` (rows, columns) int64, -1 where none does."""

    picture: Image.Image
    patch: int
    token_RC: np.ndarray

    def grid(self, kept: Sequence[int]) -> np.ndarray:
        """Which patches (rows, columns) the image tokens of these numbers show."""
        return np.isin(self.token_RC, np.asarray(kept, dtype=np.int64))

    @property
    def numbers(self) -> np.ndarray:
        """Of the image tokens that show a patch."""
        return np.unique(self.token_RC[self.token_RC >= 0])

    def count(self, kept: Sequence[int]) -> int:
        """How many of these image tokens show a patch."""
        return len(np.intersect1d(self.token_RC, kept))

    def text(self, kept: Sequence[int]) -> str:
        """How many image tokens these are, and where some show no patch how many are drawn."""
        return tokens_text(len(kept), self.count(kept))


def examples(
    settings: AnswerSettings, respondent: LlavaRespondent, questions: Sequence[Question], schedule: Schedule
) -> list[Example]:
    """Answers ``questions`` and looks at what ``generate`` kept of their first image at every stage."""
    found = []
    for question in questions:
        if question.record.images:
            result = answer(settings, respondent, [question], schedule, None, trace=True)
            sight = llava_sight(respondent, question.record.images[0], schedule.downsample)
            found.append(seen_in(result, sight))
    return found


def seen_in(result: Result, sight: Sight) -> Example:
    """What the ``result`` of one question, with its trace, left at every stage of the first image, of which the model
    had this ``sight``."""
    prompt, text = result.steps[0], result.predictions[0]
    stages = stages_of(prompt)
    kept, drawn = [sight.grid(stage) for stage in stages], [sight.count(stage) for stage in stages]
    tokens = [len(stage) for stage in stages]
    return Example(text.question, text.gold, text.answer, sight.picture, sight.patch, kept, tokens, drawn)


def tokens_text(tokens: int, drawn: int) -> str:
    """How many image tokens are there, and where some show no patch how many are ``drawn``."""
    return f"{tokens} tokens" if drawn == tokens else f"{tokens} tokens, {drawn} drawn"


def stages_of(prompt: ForwardStep) -> list[list[int]]:
    """Which image tokens of the first picture enter, and are left after every drop of the forward of a ``prompt``."""
    return [stage[0] for stage in (prompt.entering(), *map(prompt.kept, range(len(prompt.scores))))]


def llava_sight(respondent: LlavaRespondent, source: ImageSource, budget: int) -> Sight:
    """How a LLaVA sees a picture whose tiles are pooled to ``budget`` features each (0: they are not)."""
    picture, parts = load_image(source), respondent.parts
    seen = as_seen(parts.geometry, picture, parts.image_processor.image_mean)
    return Sight(seen, parts.geometry.patch, token_grid(parts.geometry, picture.size, budget))


def as_seen(geometry: ImageGeometry, picture: Image.Image, mean: Sequence[float]) -> Image.Image:
    """The picture as it is cut into patches: one padded square, or the canvas of the anyres tiles."""
    if geometry.aspect == "anyres":
        return fit_to_canvas(picture, geometry.canvas(picture.size))
    square = pad_to_square(picture, tuple(int(255 * value) for value in mean))
    return square.resize((geometry.tile, geometry.tile), Image.Resampling.BICUBIC)


def token_grid(geometry: ImageGeometry, size: tuple[int, int], budget: int = 0) -> np.ndarray:
    """The number of the image token that shows each patch of the picture of ``size`` (width, height): (rows, columns)
    int64, -1 where none does. With anyres these are the patches of the tiles; the tokens of the whole picture are left
    out. A tile that is pooled to ``budget`` features has cells: the first token of a cell stays, and shows all of it.
    """
    feature, side = geometry.merge_index(size), geometry.patches_per_side
    number = np.arange(len(feature))
    if geometry.aspect == "anyres":
        width, height = (length // geometry.tile for length in geometry.canvas(size))
        shown = (feature != NEWLINE) & (feature >= geometry.patches)
        feature, number = feature[shown] - geometry.patches, number[shown]
    else:
        width = height = 1
    tile, place = np.divmod(feature, geometry.patches)
    cell = tile * geometry.features(budget) + geometry.cell_of_patch(geometry.side(budget))[place]
    _, first, cell = np.unique(cell, return_index=True, return_inverse=True)
    token_RC = np.full((height * side, width * side), -1, dtype=np.int64)
    token_RC[tile // width * side + place // side, tile % width * side + place % side] = number[first[cell]]
    return token_RC


def surviving_tokens(shown: Sequence[Example]) -> Any:
    """A line per example: the picture, then what is left of it after every drop; dropped patches are dark."""
    columns, shape = len(shown[0].kept), shown[0].kept[0].shape
    height = 2.3 * min(1.6, max(0.6, shape[0] / shape[1]))
    size = (2.3 * columns + 1.9, (height + 0.35) * len(shown))
    figure, grid = subplots(len(shown), columns, figsize=size, layout="constrained", squeeze=False)
    for line, example in zip(grid, shown):
        for stage, (axes, kept, tokens, drawn) in enumerate(zip(line, example.kept, example.tokens, example.drawn)):
            axes.imshow(shade(np.asarray(example.picture), kept, example.patch), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set(visible=True, color=GRID)
            name = "all" if stage == 0 else f"after drop {stage}"
            title = textwrap.fill(f"{name}: {tokens_text(tokens, drawn)}", 34)
            axes.set_title(title, fontsize=9, fontweight="normal")
        _caption(line[0], example)
    return figure


def shade(picture: np.ndarray, kept: np.ndarray, patch: int) -> np.ndarray:
    """``picture`` (height, width, 3) uint8 with the patches that are not ``kept`` (rows, columns) dark and grey."""
    mask = np.repeat(np.repeat(kept, patch, 0), patch, 1)[: picture.shape[0], : picture.shape[1], None]
    grey = picture.mean(-1, keepdims=True)
    dark = np.broadcast_to(28 + 0.28 * grey, picture.shape)
    return np.where(mask, picture, dark).astype(np.uint8)


def _caption(axes: Any, example: Example) -> None:
    right = example.answer.strip().lower() == example.gold.strip().lower()
    question, gold, answer = (
        textwrap.shorten("".join(c if c.isprintable() else " " for c in text), length, placeholder=" …")
        for text, length in ((example.question, 90), (example.gold, 24), (example.answer, 24))
    )
    where = {"xycoords": "axes fraction", "ha": "right", "fontsize": 9}
    axes.annotate("\n".join(textwrap.wrap(question, 22)), (-0.08, 0.98), va="top", **where)
    text, colour = f"model: {answer or '(nothing)'}", INK
    if gold:
        text, colour = f"gold: {gold}\n{text}", "#2B7A4B" if right else "#B3372F"
    axes.annotate(text, (-0.08, 0.02), va="bottom", fontweight="bold", color=colour, **where)
