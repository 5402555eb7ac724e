"""What a comparison is made of: the rows of its table, and examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from llava_pdrop.compare.turns import Saving
from llava_pdrop.config.schema import Config
from llava_pdrop.eval.evaluate import Result
from llava_pdrop.eval.score import Score
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.metrics import Timing


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the table. ``predicted`` is the share of the vanilla step's operations saved, ``saving`` what was
    saved of its time; ``timing`` is None where nothing was trained."""

    name: str
    schedule: Schedule
    result: Result | None
    timing: Timing | None = None
    predicted: float | None = None
    saving: Saving | None = None

    @property
    def realised(self) -> float | None:
        return self.saving.realised if self.saving else None


@dataclass(frozen=True)
class Comparison:
    """Everything the report is made of. ``losses`` and ``runs``: run -> rows of its metrics / its directory;
    ``examples``: answered questions with what survived (see `Example`); ``scores``: of ``eval.benchmarks``."""

    config: Config
    rows: list[ComparisonRow]
    losses: dict[str, list[tuple[int, float]]]
    runs: dict[str, Path]
    examples: list[Example] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


@dataclass(frozen=True)
class Example:
    """A question with its picture (as the tower sees it, ``patch`` pixels per patch) and, for every stage, which
    patches (rows, columns) still have their image token."""

    question: str
    gold: str
    answer: str
    picture: Image.Image
    patch: int
    kept: list[np.ndarray]
