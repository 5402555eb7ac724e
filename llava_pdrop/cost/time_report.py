"""The modelled time of a step (`cost.step_time`) as figures: for `plan`, and to stand beside what a bench measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llava_pdrop.config.schema import Config
from llava_pdrop.cost.elementwise import KERNELS, MODELLED, kernels_of, optimizer_bytes
from llava_pdrop.cost.flops import CountedStep, StepPart, Work, step_flops
from llava_pdrop.cost.memory import learning_parameters
from llava_pdrop.cost.nominal import model_of, nominal_batch, recomputed_by, states_of
from llava_pdrop.cost.step_time import NOTE, Card, card_named, is_modelled, timed_parts
from llava_pdrop.errors import check_name
from llava_pdrop.report.page import Block, Table
from llava_pdrop.report.units import less, saved, time_unit
from llava_pdrop.schedule import Schedule


@dataclass(frozen=True)
class ArmTime:
    """One arm on a card.

    Attributes:
        parts: of forward and backward of a micro-batch.
        optimizer: bytes that the optimizer moves for each micro-batch.
        model_flops: operations that the samples ask for, without recomputation.
    """

    parts: list[StepPart]
    optimizer: float
    model_flops: float

    def figures(self, card: str) -> dict[str, Any]:
        """For machines. Times in milliseconds, of a micro-batch: ``flop_bound_ms`` and ``bandwidth_bound_ms`` by the
        data sheet of ``card``, ``ms`` as predicted; ``forward_ms`` is part of ``ms``.

        Raises:
            UserError: an unknown card.
        """
        on, whole = card_named(card), sum((part.whole for part in self.parts), Work())
        optimizer = on.seconds(Work(bytes=self.optimizer))
        seconds = on.seconds(whole) + optimizer
        return {
            "parts": [
                {"name": part.name, "tokens": part.tokens, "forward_ms": 1000 * on.seconds(part.forward)}
                | _work(part.whole, on)
                for part in self.parts
            ],
            "forward_backward": _work(whole, on),
            "optimizer_ms": 1000 * optimizer,
            "step_ms": 1000 * seconds,
            "mfu": self.model_flops / on.flops / seconds,
        }


def mean(values: Sequence[Any]) -> Any:
    """Means of the numbers of several `ArmTime.figures` of one arm, whose batches differ."""
    first = values[0]
    if isinstance(first, dict):
        return {key: mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [mean(entries) for entries in zip(*values)]
    return first if isinstance(first, str) else sum(values) / len(values)


def _work(work: Work, card: Card) -> dict[str, float]:
    flops, moved = card.bounds(work)
    return {
        "flop": work.flops,
        "bytes": work.bytes,
        "flop_bound_ms": 1000 * flops,
        "bandwidth_bound_ms": 1000 * moved,
        "ms": 1000 * card.seconds(work),
    }


@dataclass(frozen=True)
class TimeModel:
    """Of a config's step on one GPU of kind ``card``; ``arms``: vanilla and, with a schedule, dropping; ``optimizer``:
    what is in its time, in words."""

    card: str
    kernels: str
    arms: dict[str, ArmTime]
    optimizer: str


def plan_time(config: Config, gpus: int, card: str = "H100", kernels: str | None = None) -> TimeModel | str:
    """The model for a micro-batch of ``config`` with its own recomputation, or in one line why there is none.

    Args:
        gpus: over how many the engine shards the optimizer.
        card: one of `step_time.CARDS`.
        kernels: one of `elementwise.KERNELS` (None: those of the config's ``model.kernels``).

    Raises:
        ConfigError: the numbers of the model are not on this machine. UserError: unknown ``card`` or ``kernels``.
    """
    kernels = kernels_of(config.model.kernels) if kernels is None else kernels
    check_name("--kernels", kernels, KERNELS)
    card_named(card)
    model, states = model_of(config), states_of(config, gpus)
    if config.lora is not None:
        return "adapters (lora:) have element-wise work that is not counted"
    if states.autocast or states.bytes != 2:
        return "it is counted for layers in bfloat16 whose weights are bfloat16 too (train.engine: zero2, zero3, fsdp2)"
    if not is_modelled(model.config):
        return f"only {' and '.join(MODELLED)} decoders with a CLIP tower are counted"
    batch, trainable = nominal_batch(model.geometry, config), config.model.trainable
    schedule = config.schedule.check(model.layers)
    accumulation = config.train.arguments.get("gradient_accumulation_steps", 1)
    mine = learning_parameters(model.config, trainable) / states.shards
    moved = 0.0 if states.offloaded else optimizer_bytes(mine, not states.float32) / accumulation
    again, arms = recomputed_by(config, model.layers), {}
    for name, chosen in {"vanilla": Schedule(), **({"dropping": schedule} if not schedule.vanilla else {})}.items():
        step = CountedStep(model.config, batch, chosen, model.geometry, trainable)
        parts = timed_parts(replace(step, recomputed=again), kernels, schedule.layers)
        arms[name] = ArmTime(parts, moved, step_flops(step).total)
    told = f"a micro-batch's share of an optimizer step over {accumulation}, {states.label}"
    return TimeModel(card, kernels, arms, "not in it, it runs on the CPU" if states.offloaded else told)


def time_json(time: TimeModel | str) -> dict[str, Any]:
    """The model for machines; where there is none, why (``not_modelled``). ``saved``: the share of vanilla's time that
    dropping saves, of forward and backward and of the step with its optimizer."""
    if isinstance(time, str):
        return {"not_modelled": time}
    card = card_named(time.card)
    arms = {name: arm.figures(time.card) for name, arm in time.arms.items()}
    steps = [arm["step_ms"] for arm in arms.values()]
    compute = [arm["forward_backward"]["ms"] for arm in arms.values()]
    return {
        "note": NOTE,
        "card": time.card,
        "peak_flops": card.flops,
        "bytes_per_second": card.bandwidth,
        "source": card.source,
        "kernels": time.kernels,
        "optimizer": time.optimizer,
        "arms": arms,
        "saved": {"forward_backward": saved(*compute), "step": saved(*steps)} if "dropping" in arms else None,
    }


def time_blocks(told: dict[str, Any]) -> list[Block]:
    """What `time_json` has ``told``, as a table with what it means."""
    if "not_modelled" in told:
        return [f"Time of a step: not modelled: {told['not_modelled']}."]
    arms, shares = told["arms"], told["saved"]
    unit = time_unit(arm["step_ms"] / 1e3 for arm in arms.values())

    def row(name: str, figures: Sequence[dict[str, float] | None]) -> list[str]:
        cells = [name]
        for found in figures:
            times = [found.get(key) for key in ("flop_bound_ms", "bandwidth_bound_ms", "ms")] if found else []
            cells += [unit.text(ms and ms / 1e3) for ms in times] or ["-"] * 3
        return cells

    by_name = [{part["name"]: part for part in arm["parts"]} for arm in arms.values()]
    names = max(by_name, key=len)  # dropping has all that vanilla has, and its rankings
    rows = [row(name, [parts.get(name) for parts in by_name]) for name in names]
    rows.append(row("forward and backward", [arm["forward_backward"] for arm in arms.values()]))
    rows += [row(name, [{"ms": arm[f"{name}_ms"]} for arm in arms.values()]) for name in ("optimizer", "step")]
    rows.append(["MFU", *(cell for arm in arms.values() for cell in ("", "", f"{arm['mfu']:.1%}"))])
    head = [f"{name}: {title}" for name in arms for title in ("FLOP", "bytes", "time")]
    title = f"Modelled, not measured: a micro-batch on one {told['card']}, {told['kernels']} kernels, in {unit.name}"
    reduction = shares and (
        f"By this model dropping takes {less(shares['step'], 'time')}, {less(shares['forward_backward'])} without the "
        "optimizer."
    )
    return [
        Table(["", *head], rows, title),
        *([reduction] if reduction else []),
        f"FLOP: all operations at {told['peak_flops'] / 1e12:g} TFLOP/s; bytes: those of element-wise kernels at "
        f"{told['bytes_per_second'] / 1e12:g} TB/s ({told['source']}); time: predicted. Optimizer: "
        f"{told['optimizer']}. {NOTE}",
    ]
