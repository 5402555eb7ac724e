"""The modelled time of a step (`cost.step_time`) as figures: for `plan`, and to stand beside what a bench measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llava_pdrop.config.schema import Config
from llava_pdrop.cost.elementwise import MODELLED, check_kernels, kernels_of, optimizer_bytes
from llava_pdrop.cost.flops import step_flops
from llava_pdrop.cost.memory import learning_parameters
from llava_pdrop.cost.nominal import model_of, nominal_batch, recomputed_by, states_of
from llava_pdrop.cost.step_time import NOTE, Part, Work, card_named, is_modelled, step_parts
from llava_pdrop.schedule import Schedule


@dataclass(frozen=True)
class ArmTime:
    """One arm on a card.

    Attributes:
        parts: of forward and backward of a micro-batch.
        optimizer: bytes that the optimizer moves for each micro-batch.
        model_flops: operations that the samples ask for, without recomputation.
    """

    parts: list[Part]
    optimizer: float
    model_flops: float

    def figures(self, card: str) -> dict[str, Any]:
        """For machines. Times in milliseconds, of a micro-batch: ``flop_bound_ms`` and ``bandwidth_bound_ms`` by the
        data sheet of ``card``, ``ms`` as predicted; ``forward_ms`` is part of ``ms``.

        Raises:
            UserError: an unknown card.
        """
        on, whole = card_named(card), sum((part.whole for part in self.parts), Work())
        optimizer = Work(bytes=self.optimizer).seconds(on)
        seconds = whole.seconds(on) + optimizer
        return {
            "parts": [
                {"name": part.name, "tokens": part.tokens, "forward_ms": 1000 * part.forward.seconds(on)}
                | _work(part.whole, card)
                for part in self.parts
            ],
            "forward_backward": _work(whole, card),
            "optimizer_ms": 1000 * optimizer,
            "step_ms": 1000 * seconds,
            "mfu": self.model_flops / on.flops / seconds,
        }


def mean(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the numbers of several `ArmTime.figures` of one arm, whose batches differ."""
    return _mean(figures)


def _mean(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _mean([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_mean(entries) for entries in zip(*values)]
    return first if isinstance(first, str) else sum(values) / len(values)


def _work(work: Work, card: str) -> dict[str, float]:
    on = card_named(card)
    flops, moved = work.bounds(on)
    return {
        "flop": work.flops,
        "bytes": work.bytes,
        "flop_bound_ms": 1000 * flops,
        "bandwidth_bound_ms": 1000 * moved,
        "ms": 1000 * work.seconds(on),
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
    check_kernels(kernels := kernels_of(config.model.kernels) if kernels is None else kernels)
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
    for name, chosen in {"vanilla": Schedule(), **({"dropping": schedule} if schedule.layers else {})}.items():
        options = (model.config, batch, chosen, model.geometry, trainable)
        parts = step_parts(*options, again, kernels=kernels, split=schedule.layers)
        arms[name] = ArmTime(parts, moved, step_flops(*options).total)
    told = f"a micro-batch's share of an optimizer step over {accumulation}, {states.label}"
    return TimeModel(card, kernels, arms, "not in it, it runs on the CPU" if states.offloaded else told)


def time_json(time: TimeModel | str | None) -> dict[str, Any] | None:
    """The model for machines; where there is none, why (``not_modelled``)."""
    if time is None:
        return None
    if isinstance(time, str):
        return {"not_modelled": time}
    card = card_named(time.card)
    arms = {name: arm.figures(time.card) for name, arm in time.arms.items()}
    return {
        "note": NOTE,
        "card": time.card,
        "peak_flops": card.flops,
        "bytes_per_second": card.bandwidth,
        "source": card.source,
        "kernels": time.kernels,
        "optimizer": time.optimizer,
        "arms": arms,
        "saved": _saved(arms),
    }


def _saved(arms: dict[str, Any]) -> dict[str, float] | None:
    """Share of vanilla's time that dropping saves: of forward and backward, and of the step with its optimizer."""
    if "dropping" not in arms:
        return None
    vanilla, dropping = arms["vanilla"], arms["dropping"]
    return {
        "forward_backward": 1 - dropping["forward_backward"]["ms"] / vanilla["forward_backward"]["ms"],
        "step": 1 - dropping["step_ms"] / vanilla["step_ms"],
    }


def show_time(console: Console, time: TimeModel | str) -> None:
    """Prints the model as a table, or why there is none."""
    if isinstance(time, str):
        console.print(f"Time of a step: not modelled: {time}.", highlight=False)
        return
    arms = {name: arm.figures(time.card) for name, arm in time.arms.items()}
    table = Table(
        title=f"Model, not measured: milliseconds of a micro-batch on one {time.card}, {time.kernels} kernels",
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    for name in arms:
        for title in ("FLOP-bound", "bandwidth-bound", "predicted"):
            table.add_column(f"{name}\n{title}", justify="right", no_wrap=True)
    by_name = {name: {part["name"]: part for part in arm["parts"]} for name, arm in arms.items()}
    for part in max(by_name.values(), key=len):  # dropping has all that vanilla has, and its rankings
        table.add_row(part, *(cell for arm in arms for cell in _cells(by_name[arm].get(part))))
    table.add_row("forward and backward", *(cell for arm in arms.values() for cell in _cells(arm["forward_backward"])))
    table.add_row("optimizer", *(cell for arm in arms.values() for cell in ("", "", f"{arm['optimizer_ms']:.1f}")))
    table.add_row("step", *(cell for arm in arms.values() for cell in ("", "", f"{arm['step_ms']:,.1f}")))
    table.add_row("MFU", *(cell for arm in arms.values() for cell in ("", "", f"{arm['mfu']:.1%}")))
    console.print(table)
    saved = _saved(arms)
    if saved is not None:
        console.print(
            f"By this model dropping takes {saved['step']:.1%} less time, {saved['forward_backward']:.1%} without the "
            "optimizer.",
            highlight=False,
            soft_wrap=True,
        )
    card = card_named(time.card)
    console.print(
        f"FLOP-bound: all operations at {card.flops / 1e12:g} TFLOP/s; bandwidth-bound: all bytes of element-wise "
        f"kernels at {card.bandwidth / 1e12:g} TB/s ({card.source}). Optimizer: {time.optimizer}. {NOTE}",
        style="dim",
        highlight=False,
        soft_wrap=True,
    )


def _cells(work: dict[str, float] | None) -> Sequence[str]:
    if work is None:
        return ("-", "-", "-")
    return tuple(f"{work[key]:,.1f}" for key in ("flop_bound_ms", "bandwidth_bound_ms", "ms"))
