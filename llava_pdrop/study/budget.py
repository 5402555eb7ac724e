"""Which layers and ratios lose least for a budget, predicted from what single drops were measured to lose.

The image tokens are cut into bands at the measured shares, and each band leaves at a layer of its own, the worst first.
Ours: f being the points that a single drop costs, a band costs f(layer, share) - f(layer, share before it), and bands
add up. f is measured at the layers and shares of the grid; in between it is linear. It is made monotone first: a drop
costs at least what a later or smaller one was measured to cost, and never less than nothing. So noise is not taken for
a gain.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_pdrop.errors import UserError
from llava_pdrop.schedule import Schedule

PAPER = Schedule((8, 16, 24), (0.5, 0.25, 0.125))
"""For 32 layers."""

SHALLOWEST = 4
"""Layers of a decoder that has a place for each of its drops."""


@dataclass(frozen=True)
class Option:
    """A schedule on the way from all image tokens to none: their average share over the layers, the points it is
    predicted to lose, and the layers before which the bands leave (the depth of the decoder: never)."""

    average: float
    loss: float
    exits: tuple[int, ...]


@dataclass(frozen=True)
class BudgetPlan:
    """A ``schedule``: the ``name`` of its answers, its ``average`` share of the image tokens, and the points that it
    is ``predicted`` to lose (None: it drops where nothing was measured). ``budget``: image tokens, mean of the layers,
    that it was sought for."""

    name: str
    schedule: Schedule
    average: float
    predicted: float | None
    budget: float | None = None


@dataclass(frozen=True)
class Losses:
    """Points (layers, shares) that a drop before one of ``layers`` (rising) to one of ``shares`` (falling from 1)
    costs."""

    layers: tuple[int, ...]
    shares: tuple[float, ...]
    loss_LS: np.ndarray

    @classmethod
    def of(cls, measured: Mapping[tuple[int, float], float]) -> Losses:
        """From measured losses by (layer, share), made monotone."""
        layers = sorted({layer for layer, _ in measured})
        shares = [1.0, *sorted({share for _, share in measured}, reverse=True)]
        loss_LS = np.array([[measured.get((layer, share), 0.0) for share in shares] for layer in layers])
        loss_LS = np.maximum.accumulate(loss_LS, 1)
        return cls(tuple(layers), tuple(shares), np.maximum.accumulate(loss_LS[::-1], 0)[::-1])

    def at(self, layer: int, share: float) -> float:
        """Of a single drop, interpolated."""
        by_layer_S = [np.interp(layer, self.layers, column_L) for column_L in self.loss_LS.T]
        return float(np.interp(share, self.shares[::-1], by_layer_S[::-1]))

    def predicted(self, schedule: Schedule) -> float | None:
        """Points that ``schedule``, in shares, costs; None where it drops outside of what was measured."""
        inside = all(self.layers[0] <= layer <= self.layers[-1] for layer in schedule.layers)
        if not inside or min(schedule.ratios, default=1.0) < self.shares[-1]:
            return None
        before = (1.0, *schedule.ratios)
        drops = zip(schedule.layers, before, schedule.ratios)
        return sum(self.at(layer, share) - self.at(layer, last) for layer, last, share in drops)

    def least(self, depth: int) -> float:
        """The smallest average share that any schedule has here."""
        kept = self.shares[-1]
        return kept + (1 - kept) * self.layers[0] / depth

    def front(self, depth: int) -> list[Option]:
        """The schedules of which none other loses and keeps less, from the cheapest to the one that keeps all, in a
        decoder of ``depth`` layers. Found by a dynamic programme over bands and the layers at which they leave."""
        layers = [*range(self.layers[0], self.layers[-1] + 1), depth]
        last = {layer: [Option(self.shares[-1], 0.0, ())] * (layer == layers[0]) for layer in layers}
        for before, share in zip(self.shares, self.shares[1:]):
            now, so_far = dict[int, list[Option]](), list[Option]()
            for layer in layers:
                so_far = _best([*so_far, *last[layer]])  # bands that leave no later
                kept = (before - share) * layer / depth
                loss = 0.0 if layer == depth else self.at(layer, share) - self.at(layer, before)
                now[layer] = [Option(o.average + kept, o.loss + loss, (*o.exits, layer)) for o in so_far]
            last = now
        return _best([option for options in last.values() for option in options])

    def schedule(self, option: Option, depth: int) -> Schedule:
        """``option`` as it is written: bands that leave together are one drop, those that never leave are none."""
        drops = {layer: share for layer, share in zip(option.exits, self.shares[1:]) if layer < depth}
        return Schedule(tuple(drops), tuple(drops.values()))


def _best(options: list[Option]) -> list[Option]:
    """Those of which none other is better in both, the cheapest first."""
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (round(option.average, 9), option.loss)):
        if not found or option.loss < found[-1].loss - 1e-9:
            found.append(option)
    return found


def plans(losses: Losses, depth: int, tokens: float, budgets: Sequence[float], like: Schedule) -> list[BudgetPlan]:
    """The paper's schedule, where the decoder is deep enough for it, and the one of least predicted loss for each of
    the ``budgets``; none: for what the paper's keeps, or half of the tokens, or as few as there can be.

    Args:
        tokens: image tokens of a question.
        like: gives ranker and positions.

    Raises:
        UserError: a budget that no schedule on this grid meets.
    """
    found = list[BudgetPlan]()
    if depth >= SHALLOWEST:
        paper = _like(PAPER.scaled_to(depth), like)
        found.append(BudgetPlan("paper", paper, paper.average_ratio(depth), losses.predicted(paper)))
    least, front = losses.least(depth), losses.front(depth)
    for budget in budgets or [tokens * max(least, found[0].average if found else 0.5)]:
        if not least * tokens - 1e-6 <= budget < tokens:
            raise UserError(
                f"--average-tokens {budget:g}: of {tokens:g} image tokens, schedules on this grid keep from "
                f"{least * tokens:.4g} on average to below all: give such a number, or earlier --layers or smaller "
                "--shares"
            )
        option = [option for option in front if option.average <= budget / tokens + 1e-9][-1]
        schedule = _like(losses.schedule(option, depth), like)
        found.append(BudgetPlan(f"budget-{budget:.4g}", schedule, option.average, option.loss, budget))
    return found


def _like(schedule: Schedule, like: Schedule) -> Schedule:
    return replace(schedule, ranker=like.ranker, positions=like.positions)


def as_yaml(plan: BudgetPlan, depth: int, title: str) -> str:
    """The plan as a file for ``pyramid_drop``, under a comment: scaled to a decoder of another depth like the
    presets."""
    lines = {"depth": depth} | plan.schedule.to_dict()
    return f"# {title}\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
