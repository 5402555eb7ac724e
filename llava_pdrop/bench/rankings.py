"""``--compare``: what each row of `RANKERS` costs, at one drop of half the image tokens in mid-decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

import torch

from llava_pdrop.bench.train_step import BenchArm, BenchTrainer, measure_arms
from llava_pdrop.bench.variants import STEPS, WARMUP
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.report.page import Table
from llava_pdrop.report.units import OPERATIONS, column, text_of, time_unit
from llava_pdrop.runtime.clock import quartiles
from llava_pdrop.schedule import Schedule

KEPT = 0.5
"""Share of the image tokens that stays: what a ranking computes may depend on it."""


def ranker_costs(
    trainer: BenchTrainer, common: BenchArm, steps: int = STEPS, warmup: int = WARMUP
) -> list[dict[str, Any]]:
    """An entry for each ranker, ready for JSON, none where the decoder has but one layer. Their arms, otherwise like
    ``common``, take turns on the same batches.

    Returns:
        ``name``, ``layer`` and ``kept`` of the drop; ``flop``, the operations of its ranking in a step (mean), as
        `cost.flops` counts them; quartiles in seconds of ``ranking`` (with the selection of the survivors) and of
        ``step``; ``ranking_share``, its share of a step. Of a ranker that did not fit into memory only the drop and an
        ``error``.
    """
    layer = trainer.shape.text["num_hidden_layers"] // 2
    if not layer:
        return []
    arms = [replace(common, name=name, schedule=Schedule((layer,), (KEPT,), name)) for name in RANKERS]
    found = []
    for result in measure_arms(trainer, arms, steps, warmup, patient=(torch.OutOfMemoryError,)):
        arm = result.arm
        entry: dict[str, Any] = {"name": arm.name, "layer": layer, "kept": KEPT, "error": result.error}
        if result.error is None:
            ranking, step = result.seconds["ranking"], result.seconds["step"]
            entry |= {
                "flop": mean(result.ranking_flops),
                "ranking": quartiles(ranking),
                "step": quartiles(step),
                "ranking_share": median(own / whole for own, whole in zip(ranking, step)),
            }
        found.append(entry)
    return found


def table_of_rankers(entries: Sequence[dict[str, Any]]) -> Table:
    """A row for each ranker."""
    drop, times = entries[0], [entry.get("ranking", ()) for entry in entries]
    unit = time_unit(value for spread in times for value in spread)
    columns = [
        ("ranker", [entry["name"] for entry in entries]),
        column("operations", [entry.get("flop") for entry in entries], OPERATIONS),
        (f"ranking and dropping, {unit.name}", [unit.spread(own) or e["error"] for own, e in zip(times, entries)]),
        ("of the step", [text_of(entry.get("ranking_share"), ".2%") for entry in entries]),
        column("step", [entry["step"][1] if "step" in entry else None for entry in entries]),
    ]
    return Table.of_columns(
        columns, f"Rankers: {drop['kept']:.0%} of the image tokens stay before layer {drop['layer']}"
    )
