"""What dropping should save of a training step: operations, counted on batches that the run was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llava_pdrop.checkpoint.build import ModelParts, build_parts
from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.flops import CountedStep, predicted_reduction
from llava_pdrop.cost.lora import learning
from llava_pdrop.cost.nominal import recomputed_by
from llava_pdrop.data.dataset import ConversationDataset
from llava_pdrop.data.images import image_size
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.train.arguments import tried_arguments
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

    @classmethod
    def of(cls, parts: ModelParts, dataset: ConversationDataset, plan: BatchPlan, steps: Iterable[int]) -> RunBatches:
        """Those of ``steps`` in the first epoch of ``plan``."""
        size, made = plan.gradient_accumulation, plan.micro_batches(0)

        def sample(index: int) -> Sample:
            record = dataset.records[index]
            images = [ImageInput(torch.empty(0), image_size(path)) for path in record.images]
            return dataset.encoder.train(record, images)

        wanted = [batch for step in steps for batch in made[step * size : (step + 1) * size]]
        batches = [PackedBatch.pack([sample(index) for index in batch]) for batch in wanted]
        return cls(batches, parts.hf.config, parts.geometry)

    def saved_by(self, config: Config) -> float:
        """Share of the operations without drops that the run ``config`` saves on them."""
        options = (config.schedule, self.geometry, learning(config))
        again = recomputed_by(config, self.hf.text_config.num_hidden_layers)
        return predicted_reduction([CountedStep(self.hf, batch, *options, again) for batch in self.batches])


def with_predictions(rows: Sequence[VariantRow]) -> list[VariantRow]:
    """Adds to every trained row with drops what is saved of the operations of its batches: of those in the steps that
    were timed, else of those in its first steps. Runs with the same data, one after the other, read them once."""
    asked, found, completed = None, None, []
    for row in rows:
        if not row.schedule.vanilla and row.timing:
            predicted, config = row.saving.predicted if row.saving else None, row.config
            if predicted is None:
                alike = replace(config, name="", output_dir="", pyramid_drop=None, pretrain=None, paper=None)
                if found is None or alike != asked:
                    asked, found = alike, first_batches(config)
                predicted = found.saved_by(config)
            row = replace(row, predicted=predicted)
        completed.append(row)
    return completed


def first_batches(config: Config) -> RunBatches:
    """The micro-batches of the first `STEPS_COUNTED` steps of the finished run ``config``."""
    parts, args = build_parts(path=config.output_dir), tried_arguments(config)
    dataset = build_dataset(config, parts)
    steps = STEPS_COUNTED if args.max_steps <= 0 else min(args.max_steps, STEPS_COUNTED)
    return RunBatches.of(parts, dataset, build_plan(config, dataset, args), range(steps))
