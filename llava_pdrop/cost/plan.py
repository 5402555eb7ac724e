"""What a config's schedule does to image tokens, operations and memory, before anything is trained.

Numbers only: no weights, no pixels. `report` prints them, `nominal` says what a config's model and batch are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

from llava_pdrop.config.schema import Config
from llava_pdrop.cost import nominal
from llava_pdrop.cost.elementwise import kernels_of
from llava_pdrop.cost.flops import CountedStep, Recomputed, StepFlops, step_flops
from llava_pdrop.cost.lora import adapter_flops, adapter_parameters, learning
from llava_pdrop.cost.memory import Memory, predicted_peak
from llava_pdrop.cost.paper import Solution, solve_budget
from llava_pdrop.cost.states import States
from llava_pdrop.data.conversation import template_of
from llava_pdrop.errors import UserError
from llava_pdrop.report.units import GIB, saved
from llava_pdrop.schedule import Schedule, image_tokens_by_stage

NOMINAL_PICTURES = ((336, 336), (640, 480), (480, 640), (1280, 720), (1000, 1400), (2000, 500))
"""(width, height) of typical pictures: square, photographs, a screenshot, a page, a banner."""

RESERVE = 0.1
"""Share of a GPU's memory that is left for what the prediction does not contain (see `cost.memory`)."""


@dataclass(frozen=True)
class PlanRow:
    """One picture: tokens before any drop and after each one, and the paper's TFLOP without and with the schedule."""

    size: tuple[int, int]
    tokens: list[int]
    vanilla: float
    dropping: float


@dataclass(frozen=True)
class PlanStage:
    """Layers ``first`` to ``last`` and the image tokens that enter each of them, of a picture that fills the canvas."""

    first: int
    last: int
    image_tokens: int
    share: float


@dataclass(frozen=True)
class TokenPlan:
    """``rows`` has one entry per picture, ``stages`` one per stage of the ``picture`` that fills the canvas;
    ``average`` is the mean share of image tokens over the ``layers``, ``average_tokens`` their mean number.
    ``paper`` is the picture as the paper counts it: all patches of all tiles, nothing cut off, no newlines.
    """

    schedule: Schedule
    layers: int
    average: float
    average_tokens: float
    rows: list[PlanRow]
    picture: tuple[int, int]
    stages: list[PlanStage]
    paper: PlanRow


@dataclass(frozen=True)
class PlanStep:
    """Operations of one micro-batch of a training step: ``samples`` samples of ``text_tokens`` text tokens and a
    picture that fills the canvas."""

    samples: int
    text_tokens: int
    vanilla: StepFlops
    dropping: StepFlops

    @property
    def reduction(self) -> float:
        """Share of the operations that is saved: the prediction for the time of a step."""
        return saved(self.vanilla.total, self.dropping.total)


@dataclass(frozen=True)
class MemoryRow:
    """Peak of the same step on one GPU with the first ``recomputed`` decoder layers recomputed in backward."""

    recomputed: int
    vanilla: Memory
    dropping: Memory


def make_plan(config: Config, pictures: Sequence[tuple[int, int]] = NOMINAL_PICTURES) -> TokenPlan:
    """Token counts and costs of ``config`` for ``pictures`` (width, height), from config.json numbers alone.

    Raises:
        ConfigError: neither config.json nor ``model.reference_shape`` gives the numbers; an unknown template.
    """
    model = nominal.model_of(config)
    template_of(config)  # a plan needs none, but should not be drawn of a config that names one that is not there
    schedule = config.schedule.check(model.layers)

    def row(size: tuple[int, int], count: Callable[..., int]) -> PlanRow:
        n = count(size, schedule.downsample)
        return PlanRow(size, image_tokens_by_stage([n], schedule), model.tflop(count(size)), model.tflop(n, schedule))

    full, tokens = nominal.full_picture(model.geometry), model.geometry.num_tokens
    whole, n = tokens(full), tokens(full, schedule.downsample)
    edges = sorted({0, schedule.inject, *schedule.layers, model.layers})
    by_layer = schedule.tokens_per_layer(n, model.layers)
    stages = [PlanStage(a, b - 1, by_layer[a], by_layer[a] / whole) for a, b in pairwise(edges)]
    return TokenPlan(
        schedule=schedule,
        layers=model.layers,
        average=schedule.average_ratio(model.layers, n) * n / whole,
        average_tokens=model.average_tokens(n, schedule),
        rows=[row(size, tokens) for size in pictures],
        picture=full,
        stages=stages,
        paper=row(full, partial(nominal.paper_tokens, model.geometry)),
    )


def solve(config: Config, average_tokens: float | None = None, tflop: float | None = None) -> Solution:
    """The schedule that gives a picture which fills the canvas that many image tokens, averaged over the layers, or
    that many TFLOP as the paper counts. Layers, ranker and positions are the config's where it has a schedule.

    Raises:
        UserError: no schedule does that, or not exactly one of the two is given.
    """
    if (average_tokens is None) == (tflop is None):
        raise UserError("give either --average-tokens or --tflops")
    model = nominal.model_of(config)
    full, pooled = nominal.full_picture(model.geometry), config.schedule.downsample
    if tflop is not None:
        n = nominal.paper_tokens(model.geometry, full, pooled)
        return solve_budget(partial(model.tflop, n), tflop, n, model.layers, config.schedule)
    assert average_tokens is not None
    n = model.geometry.num_tokens(full, pooled)
    return solve_budget(partial(model.average_tokens, n), average_tokens, n, model.layers, config.schedule)


def plan_step(config: Config, recomputed: tuple[int, int] | None = None) -> PlanStep:
    """Operations of a micro-batch of ``config``: forward, backward and recomputation.

    Args:
        recomputed: decoder layers that (vanilla, dropping) recompute; default: what the config says, for both.

    Raises:
        ConfigError: the config recomputes more layers than there are.
    """
    model = nominal.model_of(config)
    batch = nominal.nominal_batch(model.geometry, config)
    again = (
        [Recomputed.first(n) for n in recomputed] if recomputed else [nominal.recomputed_by(config, model.layers)] * 2
    )

    def operations(schedule: Schedule, again: Recomputed) -> StepFlops:
        step = CountedStep(model.config, batch, schedule, model.geometry, learning(config), again)
        flops = step_flops(step)
        return replace(flops, decoder=flops.decoder + adapter_flops(step, config.lora))

    return PlanStep(
        samples=len(batch.seq_lens),
        text_tokens=nominal.FULL_TEXT_TOKENS,
        vanilla=operations(Schedule(), again[0]),
        dropping=operations(config.schedule.check(model.layers), again[1]),
    )


def plan_memory(config: Config, recomputed: Sequence[int], states: States) -> list[MemoryRow]:
    """The peak of a micro-batch of ``config`` for each number of recomputed decoder layers (a trainable tower's layers
    are recomputed with the first of them)."""
    model = nominal.model_of(config)
    batch = nominal.nominal_batch(model.geometry, config)
    adapters = sum(adapter_parameters(model.config.text_config, config.lora))
    kernels = kernels_of(config.model.kernels)

    def peaks(schedule: Schedule) -> list[Memory]:
        step = CountedStep(model.config, batch, schedule, model.geometry, config.model.trainable)
        steps = [replace(step, recomputed=Recomputed.first(count), known=step.layouts) for count in recomputed]
        return [predicted_peak(step, states, adapters, kernels) for step in steps]

    schedule = config.schedule.check(model.layers)
    return [MemoryRow(*row) for row in zip(recomputed, peaks(Schedule()), peaks(schedule))]


def least_recomputed(config: Config, states: States, gib: float) -> tuple[int | None, int | None]:
    """The fewest decoder layers to recompute so that (vanilla, dropping) leave `RESERVE` of ``gib`` GiB free; None
    where not even all of them are enough."""
    rows, room = plan_memory(config, range(nominal.model_of(config).layers + 1), states), room_in(gib)
    vanilla = next((row.recomputed for row in rows if row.vanilla.total <= room), None)
    return vanilla, next((row.recomputed for row in rows if row.dropping.total <= room), None)


def room_in(gib: float) -> float:
    """Bytes of a GPU of ``gib`` GiB that a prediction may take: `RESERVE` stays free."""
    return gib * GIB * (1 - RESERVE)
