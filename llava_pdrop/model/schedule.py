"""When image tokens are dropped and how many: the schedule, its validation and its token counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Schedule:
    """A dropping schedule.

    After ``layers[k]`` decoder layers have run, every image keeps ``int(n * ratios[k])`` of its ``n`` ORIGINAL tokens
    (float truncation, as the official code counts). No layers means a vanilla model.

    Attributes:
        layers: strictly growing, each in 1..num_layers-1 (the layer with that index ranks).
        ratios: one per layer, in [0, 1], never growing.
        ranker: a key of `llava_pdrop.model.pyramid_drop.RANKERS`.
        positions: ``renumber`` closes the gaps that dropped tokens leave in the position ids (the paper),
            ``keep`` leaves every survivor its first position.

    Source: paper section 3.2; `image_token_ratio_list` and `layer_list` of the official `pdrop_train.py`, without
    their leading 1.0.
    """

    layers: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()
    ranker: str = "last_instruction"
    positions: Literal["renumber", "keep"] = "renumber"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "ratios", tuple(float(ratio) for ratio in self.ratios))
        if len(self.layers) != len(self.ratios):
            raise ValueError(
                f"pyramid_drop.layers has {len(self.layers)} entries and pyramid_drop.ratios has {len(self.ratios)}: "
                "give one ratio per layer (the leading 1.0 of the official scripts is not written)"
            )
        if any(low >= high for low, high in zip(self.layers, self.layers[1:])):
            raise ValueError(f"pyramid_drop.layers must grow from entry to entry, got {list(self.layers)}")
        if any(layer < 1 for layer in self.layers):
            raise ValueError(f"pyramid_drop.layers must be at least 1, got {list(self.layers)}")
        if any(not 0.0 <= ratio <= 1.0 for ratio in self.ratios):
            raise ValueError(f"pyramid_drop.ratios must lie in [0, 1], got {list(self.ratios)}")
        if any(low < high for low, high in zip(self.ratios, self.ratios[1:])):
            raise ValueError(
                f"pyramid_drop.ratios must not grow (they count from the original tokens), got {list(self.ratios)}"
            )
        if self.positions not in ("renumber", "keep"):
            raise ValueError(f"pyramid_drop.positions must be 'renumber' or 'keep', got {self.positions!r}")

    def check(self, num_layers: int) -> Schedule:
        """Returns the schedule itself if it fits a decoder of ``num_layers`` layers.

        Raises:
            ValueError: a drop would come after the last layer.
        """
        if self.layers and self.layers[-1] >= num_layers:
            raise ValueError(
                f"pyramid_drop.layers holds {self.layers[-1]}, but the decoder has {num_layers} layers: "
                f"the last possible entry is {num_layers - 1}"
            )
        return self

    def kept(self, image_tokens: int, stage: int) -> int:
        """Tokens an image of ``image_tokens`` has left after drop number ``stage``."""
        return int(image_tokens * self.ratios[stage])

    def tokens_per_layer(self, image_tokens: int, num_layers: int) -> list[int]:
        """Image tokens that enter each of the ``num_layers`` decoder layers."""
        tokens, now = [], image_tokens
        for layer in range(num_layers):
            if layer in self.layers:
                now = self.kept(image_tokens, self.layers.index(layer))
            tokens.append(now)
        return tokens

    def average_ratio(self, num_layers: int) -> float:
        """Mean share of image tokens over the layers (0.469 for the paper's schedule)."""
        edges = (*self.layers, num_layers)
        shares = (1.0, *self.ratios)
        spans = [edges[0], *(high - low for low, high in zip(edges, edges[1:]))]
        return sum(share * span for share, span in zip(shares, spans)) / num_layers

    def single_drop(self, layer: int, num_layers: int, ranker: str) -> Schedule:
        """A schedule with one drop after ``layer`` layers and the same average share of image tokens, e.g. FastV.

        Raises:
            ValueError: so many tokens have passed before ``layer`` that no ratio >= 0 gives that average.
        """
        ratio = (self.average_ratio(num_layers) * num_layers - layer) / (num_layers - layer)
        if ratio < 0:
            raise ValueError(
                f"a single drop after layer {layer} of {num_layers} cannot average "
                f"{self.average_ratio(num_layers):.3f} of the image tokens"
            )
        return replace(self, layers=(layer,), ratios=(ratio,), ranker=ranker)

    def to_dict(self) -> dict[str, Any]:
        """The ``pyramid_drop`` section of a config.json or YAML file."""
        return {**asdict(self), "layers": list(self.layers), "ratios": list(self.ratios)}

    @staticmethod
    def from_dict(section: Mapping[str, Any] | None) -> Schedule:
        """The inverse of `to_dict`; ``None`` is the vanilla schedule."""
        return Schedule(**section) if section else Schedule()


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


def image_tokens_by_stage(totals: Sequence[int], schedule: Schedule) -> list[int]:
    """Image tokens of a set of images before any drop and after each one."""
    return [sum(totals), *(sum(schedule.kept(n, k) for n in totals) for k in range(len(schedule.layers)))]


FRACTIONS = (0.25, 0.5, 0.75)
"""Where the paper drops: after these shares of the layers (8, 16, 24 of 32)."""

LEAST_RATIO = 0.25
"""Layers that are moved are moved until a drop keeps at least this share (the paper tries 0.4, 0.5 and 0.6)."""


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
        ValueError: a vanilla model costs no more than the budget, or one layer with all tokens costs more.
    """
    vanilla = cost(replace(wanted, layers=(), ratios=()))
    if not 0 < budget < vanilla:
        raise ValueError(
            f"a budget must lie between 0 and what the model costs without drops, {vanilla:.4g}: {budget:g}"
        )
    default = tuple(dict.fromkeys(max(1, round(share * num_layers)) for share in FRACTIONS))
    layers = wanted.check(num_layers).layers or default
    found = _geometric(cost, budget, replace(wanted, layers=layers, ratios=(1.0,) * len(layers)))
    if found.schedule.kept(image_tokens, len(layers) - 1) >= 1 and found.cost <= budget:
        origin = "the config's layers" if wanted.layers else "quarters of the depth, as in the paper"
        return replace(found, reason=f"layers {list(layers)}: {origin}")
    for first in reversed(range(1, layers[0])):
        found = _geometric(cost, budget, _moved(wanted, layers, first))
        if found.ratio >= LEAST_RATIO:
            break
    if found.cost > budget or found.schedule.kept(image_tokens, len(layers) - 1) < 1:
        raise ValueError(
            f"no schedule with {len(layers)} drops that leaves an image token costs as little as {budget:g}: even with "
            f"its first drop after layer 1 it costs at least {found.cost:.4g}; give a larger budget"
        )
    return replace(
        found,
        reason=f"layers {list(found.schedule.layers)}: with {list(layers)} the layers before the first drop leave too "
        f"little of the budget, so all drops come earlier, as late as a drop keeps at least {LEAST_RATIO:g}",
    )


def _geometric(cost: Callable[[Schedule], float], budget: float, schedule: Schedule) -> Solution:
    """The largest lambda at the layers of ``schedule`` that costs at most ``budget``; 0 where even that costs more."""

    def dropping(ratio: float) -> Schedule:
        return replace(schedule, ratios=tuple(round(ratio ** (k + 1), 6) for k in range(len(schedule.layers))))

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
    return replace(schedule, layers=tuple(moved), ratios=(1.0,) * len(moved))
