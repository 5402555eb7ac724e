"""What dropping saves, timed with the two schedules taking turns: a few steps of the finished runs once more, with one
model and one optimizer, every batch with and without drops.

Runs that were trained one after the other compare what the machine did at two different times. Here whatever it does
meanwhile hits both alike. A step is that of `PyramidTrainer`, and its seconds are those that go into ``metrics.jsonl``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from llava_pdrop.compare.counted import RunBatches
from llava_pdrop.compare.rows import Saving, VariantRow
from llava_pdrop.config.load import RUN_FILE, load_config
from llava_pdrop.config.schema import Config
from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.errors import UserError, first_line
from llava_pdrop.files import read_json
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.report.console import say
from llava_pdrop.report.units import saved
from llava_pdrop.runtime.clock import no_garbage_collection, quartiles
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.runtime.preemption import Preempted
from llava_pdrop.runtime.ranks import engine_for_one_run
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.arguments import on_cpu, training_arguments
from llava_pdrop.train.history import FINISHED_FILE
from llava_pdrop.train.optim import MODEL_PARTS
from llava_pdrop.train.run import build_dataset, build_plan, learning_model
from llava_pdrop.train.trainer import PyramidTrainer
from llava_pdrop.world import number_of_processes

PAIRS, WARMUP = 10, 2
"""Steps of each schedule that are counted, and those before them that are not."""

QUIET = {
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_first_step": False,
    "save_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
}
"""Training arguments that differ from the run's: its steps are seen one by one, and leave nothing behind."""

IMPOSSIBLE = (RuntimeError, UserError, OSError, MemoryError)
"""What keeps steps from being timed: memory that is short (of a GPU or not), files that are gone since."""


def saving_of_pairs(
    vanilla: Sequence[float], dropping: Sequence[float], steps: Sequence[int], on_cpu: bool = True
) -> Saving:
    """What pairs of steps on the same batches, ``vanilla`` and ``dropping`` seconds, have saved."""
    pairs = [saved(before, after) for before, after in zip(vanilla, dropping, strict=True)]
    first, median, third = quartiles(pairs)
    return Saving(median, (first, third), tuple(pairs), tuple(steps), on_cpu)


def with_savings(rows: Sequence[VariantRow], in_turns: bool = True) -> list[VariantRow]:
    """Adds to every row with drops what they save of the time of the row without, of the same model and measured alike.
    ``in_turns``: see `saving`."""
    vanilla = {_alike(row): row.seconds for row in rows if row.schedule.vanilla}

    def completed(row: VariantRow) -> VariantRow:
        before = vanilla.get(_alike(row))
        if row.schedule.vanilla or before is None or row.seconds is None:
            return row
        return replace(row, saving=saving(row, before, row.seconds, in_turns))

    return [completed(row) for row in rows]


def _alike(row: VariantRow) -> tuple[Any, ...]:
    """What two rows must have in common for their times to be compared."""
    model, data = row.config.model, row.config.data
    parts = (model.path or model.language_model, model.vision_tower, model.aspect, model.pinpoints, model.trainable)
    return (row.timing is None, *parts, str(row.config.lora), data.samples_per_batch, data.tokens_per_batch)


def saving(row: VariantRow, before: float, after: float, in_turns: bool = True) -> Saving:
    """What ``row`` saves of an answer, or of a training step: timed by turns where that can be, else by these seconds,
    without drops and with them.

    Args:
        in_turns: whether turns may be taken; they take the time of some steps.
    """
    if row.timing is None:
        return Saving(saved(before, after), reason="the mean time of an answer")
    if not in_turns:
        return Saving(saved(before, after), reason="the median steps of finished runs of the same model")
    directory = Path(row.config.output_dir)
    config = load_config(directory / RUN_FILE)
    reason = why_no_turns(directory, row.device, "cpu" if on_cpu(config.train.arguments) else "cuda")
    if reason is None:
        say(f"timing: vanilla and PyramidDrop take turns, up to {PAIRS} steps each")
        try:
            return take_turns(config)
        except IMPOSSIBLE as error:
            reason = f"taking turns was not possible: {first_line(error)}"
        finally:
            release_memory()
    say(f"the realised saving is that of the two runs, one after the other: {reason}")
    return Saving(saved(before, after), reason=reason)


def why_no_turns(directory: Path, device: str, here: str) -> str | None:
    """Why steps cannot be timed on ``here`` as they were made in the run, on ``device``; None where they can."""
    trained, now = int(read_json(directory / FINISHED_FILE).get("processes", 1)), number_of_processes()
    if max(trained, now) > 1:
        return f"turns are taken by a run of one process, and this one had {trained}, now {now}"
    return None if here == device else f"the runs were trained on {device}, and this machine would take {here}"


def take_turns(config: Config, pairs: int = PAIRS, warmup: int = WARMUP) -> Saving:
    """Times the first ``pairs`` steps of the run ``config`` (all of its first epoch where that is shorter) with and
    without its schedule.

    Everything is as in the run (what learns, precision, recomputation, kernels, optimizer and clipping, batches with
    their pixels, accumulation) but the learning rate, which is 0: the optimizer does its work and the weights stay as
    they are. Nothing is written where the run lies. The first warm-up step takes the longest batches, so that the
    allocator has seen them; which schedule comes first changes from step to step. On a CPU there is one thread (see
    `one_thread`).

    Raises:
        UserError, RuntimeError, OSError, MemoryError: it cannot be done here.
        Preempted: a signal said stop.
    """
    with tempfile.TemporaryDirectory() as scratch, engine_for_one_run():
        arguments = {**config.train.arguments, **QUIET}
        config = replace(config, output_dir=scratch, train=replace(config.train, arguments=arguments))
        args = training_arguments(config)
        set_seed(config.seed)
        parts, model = learning_model(config, args)
        dataset = build_dataset(config, parts)
        plan = build_plan(config, dataset, args)
        available = plan.steps if args.max_steps <= 0 else min(plan.steps, args.max_steps)
        counted = tuple(range(min(pairs, available)))
        order = [*([longest_step(plan, counted), *counted] * warmup)[:warmup], *counted]
        args.max_steps = 2 * len(order)
        turns = Turns(model, (Schedule(), config.schedule))
        trainer = PyramidTrainer(
            model,
            args,
            dataset,
            Twice(**vars(plan), order=tuple(order)),
            dict.fromkeys(MODEL_PARTS, 0.0),
            skip_bad_samples=config.train.on_bad_sample == "skip",
            max_bad_samples=config.train.max_bad_samples,
        )
        trainer.add_callback(turns)
        with no_garbage_collection(), one_thread():
            result = trainer.train()
        if result.global_step < args.max_steps:
            raise Preempted
    cpu = args.device.type == "cpu"
    key = "step_cpu_seconds" if cpu else "step_seconds"
    seconds = [row[key] for row in trainer.state.log_history if "loss" in row]
    vanilla, dropping = ([seconds[step] for step in turns.taken[arm][warmup:]] for arm in (0, 1))
    predicted = RunBatches.of(parts, dataset, plan, counted).saved_by(config)
    return replace(saving_of_pairs(vanilla, dropping, counted, cpu), predicted=predicted)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the operators of a CPU. Several wait for each other at the end of every operator, and what they
    wait counts as CPU time and grows with what else the machine does: on two busy cores the saving of the embedded
    default came out at half of what it is on idle ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def longest_step(plan: BatchPlan, steps: Sequence[int]) -> int:
    """Which of ``steps`` has the longest micro-batch."""
    size, batches = plan.gradient_accumulation, plan.micro_batches(0)

    def tokens(step: int) -> int:
        return max(sum(plan.lengths[i] for i in batch) for batch in batches[step * size : (step + 1) * size])

    return max(steps, key=tokens)


@dataclass(frozen=True)
class Twice(BatchPlan):
    """The micro-batches of the steps ``order`` of a plan's first epoch, every step twice in a row."""

    order: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        return 2 * len(self.order)

    def micro_batches(self, epoch: int, rank: int = 0) -> list[list[int]]:
        """The same in every epoch."""
        size, batches = self.gradient_accumulation, super().micro_batches(0, rank)
        return [batch for step in self.order for _ in range(2) for batch in batches[step * size : (step + 1) * size]]


@dataclass
class Turns(TrainerCallback):
    """Gives ``model`` the schedule whose turn it is; ``taken`` has the steps that each of them made."""

    model: PyramidLlava
    schedules: tuple[Schedule, Schedule]
    taken: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pair, place = divmod(state.global_step, 2)
        arm = (pair + place) % 2
        self.model.schedule = self.schedules[arm]
        self.taken[arm].append(state.global_step)
