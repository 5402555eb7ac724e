"""The paper's formula for what image tokens cost, and the schedules that meet a budget by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from llava_pdrop.errors import UserError
from llava_pdrop.schedule import Schedule

FRACTIONS = (0.25, 0.5, 0.75)
"""Where the paper drops: after these shares of the layers (8, 16, 24 of 32)."""

LEAST_RATIO = 0.25
"""Layers that are moved are moved until a drop keeps at least this share (the paper tries 0.4, 0.5 and 0.6)."""


def paper_tflop(
    image_tokens: int, num_layers: int, hidden: int, intermediate: int, schedule: Schedule = Schedule()
) -> float:
    """The paper's cost of the image tokens in the decoder, in 1e12 multiply-accumulates (the figure its tables call
    TFLOPs): per layer with n image tokens ``4nd^2 + 2n^2d + 3ndm`` (paper section 3.3; the 3 is SwiGLU's)."""
    return (
        sum(
            4 * n * hidden**2 + 2 * n**2 * hidden + 3 * n * hidden * intermediate
            for n in schedule.tokens_per_layer(image_tokens, num_layers)
        )
        / 1e12
    )


@dataclass(frozen=True)
class Solution:
    """A schedule that meets a budget: every drop keeps the share ``ratio`` of what the one before it left. ``cost`` is
    what it costs; ``reason`` says why its layers were chosen."""

    schedule: Schedule
    ratio: float
    cost: float
    reason: str


def solve_budget(
    cost: Callable[[Schedule], float],
    budget: float,
    image_tokens: int,
    num_layers: int,
    wanted: Schedule = Schedule(),
) -> Solution:
    """The ratios lambda, lambda^2, ... at the layers of ``wanted`` that cost ``budget``: an average number of image
    tokens, a number of TFLOP, or whatever ``cost`` says.

    Where the layers before the first drop cost too much for any lambda that leaves one of ``image_tokens`` at the end,
    all drops come earlier, in the same proportions, as late as lambda stays at least `LEAST_RATIO` (or, where no layers
    allow that, right after the first layer).

    Args:
        cost: never falls when a schedule keeps more tokens.
        wanted: gives layers (none: quarters of the depth), ranker and positions.

    Raises:
        UserError: a vanilla model costs no more than the budget, or one layer with all tokens costs more.
    """
    vanilla = cost(Schedule())
    if not 0 < budget < vanilla:
        raise UserError(
            f"a budget must lie between 0 and what the model costs without drops, {vanilla:.4g}: {budget:g}"
        )
    default = tuple(dict.fromkeys(max(1, round(share * num_layers)) for share in FRACTIONS))
    layers = wanted.check(num_layers).layers or default
    found = _geometric(cost, budget, replace(wanted, layers=layers, ratios=(1.0,) * len(layers), keep=()))
    if found.schedule.kept(image_tokens, len(layers) - 1) >= 1 and found.cost <= budget:
        origin = "the config's layers" if wanted.layers else "quarters of the depth, as in the paper"
        return replace(found, reason=f"layers {list(layers)}: {origin}")
    for first in reversed(range(1, layers[0])):
        found = _geometric(cost, budget, _moved(wanted, layers, first))
        if found.ratio >= LEAST_RATIO:
            break
    if found.cost > budget or found.schedule.kept(image_tokens, len(layers) - 1) < 1:
        raise UserError(
            f"no schedule with {len(layers)} drops that leaves an image token costs as little as {budget:g}: even with "
            f"its first drop after layer 1 it costs at least {found.cost:.4g}; give a larger budget"
        )
    return replace(
        found,
        reason=f"layers {list(found.schedule.layers)}: with {list(layers)} the layers before the first drop leave too "
        f"little of the budget, so all drops come earlier, as late as a drop keeps at least {LEAST_RATIO:g}",
    )


def solve_shape(
    cost: Callable[[Schedule], float], budget: float, image_tokens: int, num_layers: int, wanted: Schedule
) -> Solution:
    """``wanted`` at the same layers, with ratios that cost ``budget``: all of them raised to one power, so that the
    schedule keeps its shape. lambda, lambda^2, ... become those of another lambda, 0 stays an early exit, and a count
    of tokens becomes the power of its share of ``image_tokens``. `Solution.ratio` is the largest of them.

    Ours: the papers report their schedules at budgets of their own choice.

    Args:
        cost: never falls when a schedule keeps more tokens.

    Raises:
        UserError: the layers before the first drop cost more, those that image tokens reach at all cost less, or
            nothing in between leaves every drop a token that ``wanted`` leaves one.
    """
    shares = [wanted.check(num_layers).kept(image_tokens, drop) / image_tokens for drop in range(len(wanted.layers))]
    if not wanted.keep:
        shares = list(wanted.ratios)  # not cut down to whole tokens
    own = max((share for share in shares if 0 < share < 1), default=0.5)
    exponents = [math.inf if share == 0 else math.log(share) / math.log(own) for share in shares]
    free = replace(wanted, ratios=(1.0,) * len(shares), keep=())
    most = cost(replace(free, ratios=tuple(float(share > 0) for share in shares)))
    found = _geometric(cost, budget, free, exponents)
    starved = any(share > 0 and not found.schedule.kept(image_tokens, k) for k, share in enumerate(shares))
    if most < budget or found.cost > budget or starved:
        least = cost(replace(free, ratios=tuple(float(share == 1) for share in shares)))
        raise UserError(
            f"drops after layers {list(wanted.layers)} that leave a token where they left one cost more than "
            f"{least:.4g} and at most {most:.4g}: {budget:g} is out of reach"
        )
    return replace(found, reason=f"layers {list(wanted.layers)}: the schedule's own")


def _geometric(
    cost: Callable[[Schedule], float], budget: float, schedule: Schedule, exponents: Sequence[float] = ()
) -> Solution:
    """The largest lambda at the layers of ``schedule`` that costs at most ``budget``; 0 where even that costs more.

    Args:
        exponents: those of lambda, one per drop; none: 1, 2, 3, ...
    """
    exponents = exponents or range(1, len(schedule.layers) + 1)

    def dropping(ratio: float) -> Schedule:
        return replace(schedule, ratios=tuple(round(ratio**exponent, 6) for exponent in exponents))

    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(dropping(middle)) <= budget else (low, middle)
    return Solution(dropping(low), low, cost(dropping(low)), "")


def _moved(schedule: Schedule, layers: Sequence[int], first: int) -> Schedule:
    """``layers`` pulled to the front so that the first one is ``first``, in the same proportions."""
    moved: list[int] = []
    for layer in layers:
        moved.append(max(moved[-1] + 1 if moved else 1, round(layer * first / layers[0])))
    return replace(schedule, layers=tuple(moved), ratios=(1.0,) * len(moved), keep=(), inject=0)
