"""``--compare``: what each choice behind a step is worth, by measuring it against its alternative, in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_pdrop.bench.train_step import BenchArm, BenchTrainer, Measured, rounds
from llava_pdrop.cost.flops import ALL_LAYERS, Recomputed
from llava_pdrop.model import kernels
from llava_pdrop.model.attention import BACKENDS
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, PackedBatch

STEPS, WARMUP = 3, 1
"""Steps of every variant: a comparison, not the headline."""


@dataclass(frozen=True)
class StepVariant:
    """One alternative of a ``group``. ``change`` makes it of an arm; ``unavailable`` is why it cannot run here."""

    group: str
    name: str
    change: Callable[[BenchArm], BenchArm]
    unavailable: str | None = None


@dataclass(frozen=True)
class Compared:
    """A variant with what was measured of it, one entry per arm (none where it is not available)."""

    variant: StepVariant
    results: list[Measured]


def compare(
    trainer: BenchTrainer, arms: Sequence[BenchArm], steps: int = STEPS, warmup: int = WARMUP
) -> Iterator[list[Compared]]:
    """Measures all `variants` of ``arms``, group by group."""
    depth = trainer.shape.text["num_hidden_layers"]
    chosen = variants(arms[0].samples or trainer.shape.samples, depth, trainer.device, trainer.dtype)
    for group in dict.fromkeys(variant.group for variant in chosen):
        members = [variant for variant in chosen if variant.group == group]
        *_, compared = tried(trainer, arms, members, steps, warmup, patient=(torch.OutOfMemoryError,))
        yield compared


def tried(
    trainer: BenchTrainer,
    arms: Sequence[BenchArm],
    members: Sequence[StepVariant],
    steps: int,
    warmup: int,
    patient: tuple[type[Exception], ...],
) -> Iterator[list[Compared]]:
    """Measures ``arms`` in those of ``members`` that can run, all taking turns step by step. Yields what is known so
    far of every one after each counted step; the arguments are those of `rounds`."""
    able = [variant for variant in members if variant.unavailable is None]
    changed = [variant.change(arm) for variant in able for arm in arms]
    for results in rounds(trainer, changed, steps, warmup, patient) if changed else ([],):
        place = iter(results)
        taken = {variant.name: [next(place) for _ in arms] for variant in able}
        yield [Compared(variant, taken.get(variant.name, [])) for variant in members]


def variants(samples: int, depth: int, device: torch.device, dtype: torch.dtype) -> list[StepVariant]:
    """All of them, for ``samples`` in a micro-batch and a decoder of ``depth`` layers. Recomputing its first quarter is
    the selective case: with the paper's schedule these layers have the whole stream."""
    found = [
        StepVariant("batch", "packed", changing()),
        StepVariant("batch", "padded", changing(prepare=pad)),
        StepVariant("logits", "label tokens", changing()),
        StepVariant("logits", "every surviving token", changing(full_logits=True)),
    ]
    for backend in BACKENDS[1:]:
        found.append(StepVariant("attention", backend, changing(backend=backend), missing(backend, device, dtype)))
    found += [
        StepVariant("recomputation", "none", changing(recomputed=Recomputed())),
        StepVariant("recomputation", "every layer", changing(recomputed=ALL_LAYERS)),
        StepVariant("recomputation", "first quarter", changing(recomputed=Recomputed(depth // 4, True))),
    ]
    counts = sorted({max(1, samples // 2), samples, 2 * samples})
    found += [StepVariant("samples per micro-batch", str(count), changing(samples=count)) for count in counts]
    for name in kernels.CHOICES[1:]:
        found.append(StepVariant("kernels", name, changing(kernels=name), kernels.missing(name, device)))
    return found


def changing(**changes: Any) -> Callable[[BenchArm], BenchArm]:
    """For `StepVariant.change`: other fields of an arm."""
    return lambda arm: replace(arm, **changes)


def missing(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why an attention backend cannot run on ``device``, or None."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (torch.float16, torch.bfloat16):
        return "needs half precision"
    package = "torch.nn.attention.varlen" if backend == "varlen" else "flash_attn"
    return None if find_spec(package) else f"{package} is not installed"


def pad(batch: PackedBatch) -> PackedBatch:
    """Every sample filled up to the longest one of the batch with text tokens that carry no label, as in a padded
    batch whose padding is computed. They stand last, so nothing before them changes, the loss included.

    They are text to the model and never dropped, while a padded implementation may shorten its padding after each drop:
    where samples have different numbers of image tokens, the dropping arm pays the most that padding can cost.
    """
    longest = max(batch.seq_lens)
    moved = [number * longest for number in range(len(batch.seq_lens))]  # where each sample starts now
    starts = [sum(batch.seq_lens[:number]) for number in range(len(batch.seq_lens))]

    def shift(position: int) -> int:
        sample = max(number for number, start in enumerate(starts) if start <= position)
        return position - starts[sample] + moved[sample]

    def fill(tensor: Tensor, value: int) -> Tensor:
        return torch.cat([F.pad(part, (0, longest - len(part)), value=value) for part in tensor.split(batch.seq_lens)])

    return replace(
        batch,
        input_ids=fill(batch.input_ids, 0),
        labels=fill(batch.labels, IGNORE_INDEX),
        seq_lens=[longest] * len(batch.seq_lens),
        image_spans=[(shift(start), shift(start) + stop - start) for start, stop in batch.image_spans],
        answer_starts=[[shift(place) for place in sample] for sample in batch.answer_starts],
        label_positions=[shift(place) for place in batch.label_positions],
    )


def arms_of(schedules: dict[str, Schedule], common: BenchArm) -> list[BenchArm]:
    """Vanilla and every schedule, otherwise like ``common``."""
    named = {"vanilla": Schedule(), **schedules}
    return [replace(common, name=name, schedule=schedule) for name, schedule in named.items()]
