"""What dropping should save of a training step: operations, counted on batches that the run was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.flops import predicted_reduction
from llava_pdrop.cost.lora import learning
from llava_pdrop.data.images import image_size
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.train.arguments import recomputes_activations
from llava_pdrop.train.checks import tried_arguments
from llava_pdrop.train.run import build_dataset, build_plan
from llava_pdrop.types import ImageInput, PackedBatch, Sample

STEPS_COUNTED = 100
"""Steps at the beginning of a run whose batches are counted where no steps were timed."""


@dataclass(frozen=True)
class RunBatches:
    """Micro-batches of a run without their pixels, and what their operations are counted by: the Hugging Face config,
    and how pictures become tokens."""

    batches: list[PackedBatch]
    hf: Any
    geometry: ImageGeometry
    recomputes: bool


def with_predictions(rows: Sequence[VariantRow]) -> list[VariantRow]:
    """Adds to every trained row with drops what the operations of its batches save: those of the steps that were timed,
    else those of the first steps of the run. Rows with the same data, one after the other, read them once."""
    known, found, completed = None, None, []
    for row in rows:
        if row.timing is not None and row.schedule.layers:
            config, steps = row.config, row.saving.steps if row.saving else ()
            asked = replace(config, name="", output_dir="", pyramid_drop=None, pretrain=None, paper=None), steps
            if found is None or asked != known:
                known, found = asked, batches_of(config, steps)
            options = (learning(config), found.recomputes, config.train.recompute_layers)
            predicted = predicted_reduction(found.hf, found.batches, config.schedule, found.geometry, *options)
            row = replace(row, predicted=predicted)
        completed.append(row)
    return completed


def batches_of(config: Config, steps: Sequence[int]) -> RunBatches:
    """The micro-batches of the finished run ``config`` in ``steps`` of its first epoch, without any in the first
    `STEPS_COUNTED`."""
    parts = build_parts(path=config.output_dir)
    args, dataset = tried_arguments(config), build_dataset(config, parts)
    size, made = args.gradient_accumulation_steps, build_plan(config, dataset, args).micro_batches(0)
    first = range(STEPS_COUNTED if args.max_steps <= 0 else min(args.max_steps, STEPS_COUNTED))

    def sample(index: int) -> Sample:
        record = dataset.records[index]
        return dataset.encoder.train(record, [ImageInput(torch.empty(0), image_size(path)) for path in record.images])

    batches = [
        PackedBatch.pack([sample(index) for index in batch])
        for step in steps or first
        for batch in made[step * size : (step + 1) * size]
    ]
    return RunBatches(batches, parts.hf.config, parts.geometry, recomputes_activations(args))
