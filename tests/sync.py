"""A training of `PyramidTrainer` in which nothing may make the host wait for the device but the one look that
`StepGuard` takes in every optimizer step: on a GPU (tests/gpu) and, by counting operators, without one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.trainer import PyramidTrainer
from tests.tiny import ANYRES, mixed_samples

STEPS, ACCUMULATION = 3, 2


def make_trainer(model: PyramidLlava, directory: Path, **arguments: Any) -> PyramidTrainer:
    """For `STEPS` optimizer steps of `ACCUMULATION` micro-batches of three samples, some of them without a picture."""
    samples = [sample for sample in mixed_samples(ANYRES) for _ in range(4)]
    args = TrainingArguments(
        output_dir=str(directory), max_steps=STEPS, gradient_accumulation_steps=ACCUMULATION, bf16=True,
        disable_tqdm=True, report_to="none", save_strategy="no", logging_steps=1, **arguments,
    )  # fmt: skip
    lengths = [len(sample.input_ids) for sample in samples]
    plan = BatchPlan(lengths, gradient_accumulation=ACCUMULATION, samples_per_batch=3, shuffle=False)
    rates = {"language_model": 1e-3, "projector": 1e-3, "vision_tower": 1e-3}
    return PyramidTrainer(model, args, samples, plan, rates)


def train_forbidding_reads(
    trainer: PyramidTrainer,
    forbidding: Callable[[], AbstractContextManager],
    allowing: Callable[[], AbstractContextManager],
) -> None:
    """Trains. From the second optimizer step on (the first one builds handles and caches) every `training_step`, from
    the batch of the loader to the gradients, runs in ``forbidding()``, and in there the guard's check, which must come
    once an optimizer step, in ``allowing()``."""
    step, check = trainer.training_step, trainer.guard.check
    forbidden: list[int] = []
    checked: list[int] = []

    def training_step(*arguments: Any, **options: Any) -> Any:
        if trainer.state.global_step == 0:
            return step(*arguments, **options)
        forbidden.append(trainer.state.global_step + 1)
        with forbidding():
            return step(*arguments, **options)

    def alone_allowed(number: int) -> None:
        checked.append(number)
        if trainer.state.global_step == 0:
            return check(number)
        with allowing():
            check(number)

    trainer.training_step, trainer.guard.check = training_step, alone_allowed
    trainer.train()
    assert forbidden == [number for number in range(2, STEPS + 1) for _ in range(ACCUMULATION)]
    assert checked == list(range(1, STEPS + 1))
    assert all(row["loss"] > 0 for row in trainer.state.log_history if "loss" in row)
