"""Which layers the arms of a training bench recompute: all, so many, or only what a card's memory forces.

A published figure has both arms with one setting. A user gives each arm the least that fits: dropping needs less
memory, so it recomputes less, and that is part of what it saves. Either can be measured, and both in turns. The tower
is recomputed only where the memory forces something and more decoder layers in its place would take longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_pdrop.bench.train_step import BenchArm, BenchTrainer
from llava_pdrop.cost.flops import Recomputed
from llava_pdrop.cost.plan import room_in
from llava_pdrop.cost.step_time import card_named
from llava_pdrop.errors import UserError
from llava_pdrop.report.units import GIB, MIB
from llava_pdrop.types import PackedBatch

ALL, AUTO = "all", "auto"


@dataclass(frozen=True)
class RecomputeSetting:
    """What one word of ``--recompute-layers`` asks for: of each arm `ALL`, `AUTO`, or a number of first layers."""

    word: str
    counts: tuple[str | int, ...]

    @property
    def label(self) -> str:
        """Added to the name of an arm, where there are several settings."""
        return {ALL: "all recomputed", AUTO: "as memory forces"}.get(self.word, f"{self.word} recomputed")


def read_setting(word: str, arms: int, depth: int) -> RecomputeSetting:
    """``all``, ``auto``, a number, or as many of these as there are arms, with commas: ``14,0``.

    Raises:
        UserError: something else, a number of layers that there are not, or another number of arms.
    """
    counts: list[str | int] = []
    for part in word.split(","):
        if part in (ALL, AUTO):
            counts.append(part)
        elif part.isdecimal() and int(part) <= depth:
            counts.append(int(part))
        else:
            raise UserError(
                f"--recompute-layers {word}: {part!r} is neither {ALL} nor {AUTO} nor a number of layers from 0 to "
                f"{depth}, the decoder's depth"
            )
    if len(counts) not in (1, arms):
        raise UserError(
            f"--recompute-layers {word}: {len(counts)} numbers for {arms} arms (vanilla and every schedule): give one, "
            f"or {arms}"
        )
    return RecomputeSetting(word, tuple(counts if len(counts) == arms else counts * arms))


def room_of(device: torch.device, card: str | None) -> float | None:
    """`room_in` a ``card``, or in ``device`` where none is named; None on a CPU without a card.

    Raises:
        UserError: an unknown card.
    """
    if card is not None:
        return room_in(card_named(card).gib)
    if device.type != "cuda":
        return None
    return room_in(torch.cuda.get_device_properties(device).total_memory / GIB)


def to_json(recomputed: Recomputed) -> dict[str, Any]:
    """The keys of a run in a report."""
    return {
        "recompute": bool(recomputed),
        "recompute_layers": recomputed.layers,
        "recompute_tower": recomputed.tower,
    }


def from_json(run: Mapping[str, Any]) -> Recomputed:
    """What a ``run`` of a report recomputed."""
    return Recomputed(run["recompute_layers"], run["recompute_tower"]) if run["recompute"] else Recomputed()


def arms_in(
    trainer: BenchTrainer,
    arms: Sequence[BenchArm],
    settings: Sequence[RecomputeSetting],
    steps: int,
    card: str | None = None,
) -> list[BenchArm]:
    """``arms`` in every one of ``settings``, by which they are called where there are several; without any as they are.

    Raises:
        UserError: as `arms_with`.
    """
    if not settings:
        return list(arms)
    found = [arm for setting in settings for arm in arms_with(trainer, arms, setting, steps, card)]
    if len(settings) == 1:
        return found
    return [replace(arm, name=f"{arm.name}, {arm.setting}") for arm in found]


def arms_with(
    trainer: BenchTrainer, arms: Sequence[BenchArm], setting: RecomputeSetting, steps: int, card: str | None = None
) -> list[BenchArm]:
    """``arms``, each recomputing what ``setting`` asks for in the first ``steps`` batches.

    Raises:
        UserError: `AUTO` on a CPU without ``card``, or where an arm does not fit however much is recomputed.
    """
    room = room_of(trainer.device, card)
    if room is None and AUTO in setting.counts:
        raise UserError(f"--recompute-layers {AUTO} needs the memory of a GPU: add --card H100 or the like on a CPU")
    batches = [trainer.workload.batch(step, trainer.device, arms[0].samples) for step in range(steps)]
    chosen = [_arm_with(trainer, arm, count, batches, room) for arm, count in zip(arms, setting.counts)]
    return [replace(arm, setting=setting.label) for arm in chosen]


def _arm_with(
    trainer: BenchTrainer, arm: BenchArm, count: str | int, batches: Sequence[PackedBatch], room: float | None
) -> BenchArm:
    """The fewest operations of those settings that ``count`` allows and that fit into ``room`` bytes. A number of
    layers holds whether it fits or not: the measurement will tell."""
    depth = trainer.shape.text["num_hidden_layers"]
    numbers = range(depth + 1) if count == AUTO else [depth if count == ALL else int(count)]
    towers = (False, True) if "vision_tower" in trainer.shape.trainable else (False,)
    counts = [None if number == depth else number for number in numbers]
    choices = [replace(arm, recomputed=Recomputed(count, tower)) for tower in towers for count in counts]
    layouts = [trainer.counted(arm, batch).layouts for batch in batches]

    def peak(choice: BenchArm) -> float:
        return max(trainer.predicted_peak_mib(choice, *known) for known in zip(batches, layouts)) * MIB

    choices.sort(key=lambda choice: trainer.hardware_flops(choice, batches[0]))
    fitting = next((choice for choice in choices if room is None or peak(choice) <= room), None)
    if fitting is not None:
        return fitting
    if count != AUTO:
        return choices[-1]
    assert room is not None
    lacking = (min(map(peak, choices)) - room) / GIB
    raise UserError(
        f"--recompute-layers {AUTO}: {arm.name} does not fit into {room / GIB:.1f} GiB however much is recomputed, "
        f"{lacking:.1f} GiB are missing: try a smaller --samples, or --optimizer none"
    )
