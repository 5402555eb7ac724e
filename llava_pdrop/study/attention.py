"""Where the end of the prompt looks: how concentrated its attention on image tokens is, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_pdrop.eval.answering import Answer, answer_all
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.eval.team import Team
from llava_pdrop.generate.prefill import ForwardStep
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.grid import ATTENTION

TOP = 0.1
"""Share of a picture's tokens whose attention is added up."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of the last token of the instruction in one ``layer``, mean over its heads and over pictures.

    ``mass`` is what goes to a picture, of 1 for the whole prompt. Of that, ``entropy`` is the Shannon entropy over the
    picture's n tokens, as a share of ln n: 1 is evenly spread, 0 all on one token. ``top`` is the share that the `TOP`
    best tokens have. ``errors`` are the standard errors of the three.
    """

    layer: int
    mass: float
    entropy: float
    top: float
    errors: tuple[float, ...]


def probe_schedule(first: int, depth: int, positions: Any = "auto") -> Schedule:
    """Ranks before every layer from ``first`` to the last of ``depth``, and drops nothing."""
    layers = tuple(range(first, depth))
    return Schedule(layers, (1.0,) * len(layers), ATTENTION, positions)


def look(
    respondent: Respondent, questions: Sequence[Question], schedule: Schedule, team: Team, **options: Any
) -> list[LayerAttention]:
    """What the ranking of every layer of ``schedule``, a `probe_schedule`, sees. All processes of ``team`` call this.

    Args:
        options: of `answer_all`.
    """
    found: list[list[tuple[float, float, float]]] = [[] for _ in schedule.layers]
    steps: list[ForwardStep] = []

    def take(_: Sequence[Answer]) -> None:
        for step in steps:
            sizes = [len(places) for places in step.pictures]
            for own, score_V in zip(found, step.scores):
                own += [concentration(score_N) for score_N in score_V.split(sizes)]
        steps.clear()  # of all questions they would not fit into memory

    answer_all(
        respondent, questions, schedule, max_new_tokens=1, steps=steps, team=team, keep=take, strict=False, **options
    )
    shares = team.gather(found)
    rows = []
    for place, layer in enumerate(schedule.layers):
        seen = np.array([row for share in shares for row in share[place]]).reshape(-1, 3)
        errors = seen.std(0, ddof=1) / len(seen) ** 0.5 if len(seen) > 1 else np.zeros(3)
        mass, entropy, top = seen.mean(0).tolist()
        rows.append(LayerAttention(layer, mass, entropy, top, tuple(errors.tolist())))
    return rows


def concentration(score_N: Tensor) -> tuple[float, float, float]:
    """(mass, entropy, top) of `LayerAttention`, of the weights (N,) of one picture."""
    weight_N = score_N.double()
    mass, count = float(weight_N.sum()), len(weight_N)
    if mass == 0:  # underflow: as good as even
        weight_N = torch.ones_like(weight_N)
    share_N = weight_N / weight_N.sum()
    entropy = float(torch.special.entr(share_N).sum()) / log(count) if count > 1 else 1.0
    return mass, entropy, float(share_N.topk(ceil(TOP * count)).values.sum())
