"""Which samples share a micro-batch, for a whole epoch, known in advance.

The plan is a pure function of (lengths, seed, epoch, world size): every rank computes it alone, and resuming at step n
means reading it from step n, without replaying any data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from torch.utils.data import Sampler

from llava_pdrop.errors import UserError

Bins = list[list[int]]


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of every epoch.

    Give one of ``samples_per_batch`` and ``tokens_per_batch``. An optimizer step takes ``gradient_accumulation``
    micro-batches on each of ``world_size`` ranks, and an epoch is a whole number of steps, so every rank has the same
    number of micro-batches. What is left over for the last step is spread thinner instead of being dropped: its
    micro-batches are split until every rank has one. (The loss is normalised over the step, so a smaller micro-batch
    weighs less by itself.) Only when single samples are all that is left to split are some samples seen twice, at
    most one micro-batch each, fewer than ``world_size * gradient_accumulation`` in all.

    Attributes:
        lengths: tokens of every sample.
        seed: of the shuffling.
        samples_per_batch: micro-batches of so many samples, drawn anew every epoch.
        tokens_per_batch: micro-batches of at most so many tokens. Samples are put together once, first fit among
            ``window`` consecutive samples of a shuffled order; every epoch shuffles the micro-batches, so that all
            epochs have the same number of them.
        shuffle: False keeps the order of the data.

    Raises:
        UserError: no samples, a number that must be positive, both or none of the two sizes, or a sample longer than
            the budget.
    """

    lengths: Sequence[int] = field(repr=False)
    seed: int = 0
    world_size: int = 1
    gradient_accumulation: int = 1
    samples_per_batch: int | None = None
    tokens_per_batch: int | None = None
    window: int = 1024
    shuffle: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths:
            raise UserError("cannot plan batches of an empty data set")
        if (self.samples_per_batch is None) == (self.tokens_per_batch is None):
            raise UserError("give either samples_per_batch or tokens_per_batch")
        for name in ("world_size", "gradient_accumulation", "samples_per_batch", "tokens_per_batch", "window"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        longest = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        if self.tokens_per_batch is not None and self.lengths[longest] > self.tokens_per_batch:
            raise UserError(
                f"sample {longest} has {self.lengths[longest]} tokens, more than tokens_per_batch="
                f"{self.tokens_per_batch}; raise the budget or lower the maximum length"
            )

    @property
    def batches_per_step(self) -> int:
        """Micro-batches of one optimizer step, all ranks together."""
        return self.world_size * self.gradient_accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return len(_plan(self, 0)) // self.batches_per_step

    @property
    def batches_per_rank(self) -> int:
        """Micro-batches every rank runs in an epoch."""
        return self.steps * self.gradient_accumulation

    def fingerprint(self) -> str:
        """Stands for which micro-batches make up which step; equal for all splits of a step into ranks and
        accumulation, since those only share out the same micro-batches."""
        kind = (self.seed, self.batches_per_step, self.samples_per_batch, self.tokens_per_batch, self.window)
        digest = hashlib.sha256(repr((*kind, self.shuffle)).encode())
        digest.update(np.asarray(self.lengths, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    def micro_batches(self, epoch: int, rank: int = 0) -> Bins:
        """The micro-batches of one rank in running order, as sample indices.

        Within a step they are dealt by size, so that ranks that wait for each other have about the same to do.

        Raises:
            UserError: no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise UserError(f"rank {rank} is not one of {self.world_size}")
        return [list(batch) for batch in _plan(self, epoch)[rank :: self.world_size]]


class PlanSampler(Sampler[list[int]]):
    """`BatchPlan` as the ``batch_sampler`` of a `torch.utils.data.DataLoader`. It yields the batches of its own rank
    only, so nothing must shard it again."""

    def __init__(self, plan: BatchPlan, rank: int = 0) -> None:
        self.plan = plan
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.plan.batches_per_rank

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.plan.micro_batches(self.epoch, self.rank))


@lru_cache(maxsize=2)
def _plan(plan: BatchPlan, epoch: int) -> Bins:
    """All micro-batches of an epoch: steps, in them accumulation, in that ranks."""
    order = list(range(len(plan.lengths)))
    epoch_order = np.random.default_rng((plan.seed, epoch))
    if plan.samples_per_batch is not None:
        if plan.shuffle:
            epoch_order.shuffle(order)
        size = plan.samples_per_batch
        bins = [order[i : i + size] for i in range(0, len(order), size)]
    else:
        if plan.shuffle:
            np.random.default_rng(plan.seed).shuffle(order)
        bins = _first_fit(order, plan.lengths, plan.tokens_per_batch, plan.window)
        if plan.shuffle:
            epoch_order.shuffle(bins)
    bins = _fill_last_step(bins, plan.batches_per_step)

    def tokens(batch: list[int]) -> int:
        return sum(plan.lengths[i] for i in batch)

    result: Bins = []
    for start in range(0, len(bins), plan.batches_per_step):
        result += sorted(bins[start : start + plan.batches_per_step], key=tokens, reverse=True)
    return result


def _first_fit(order: list[int], lengths: Sequence[int], budget: int | None, window: int) -> Bins:
    """Each sample into the first micro-batch of its window that has room for it."""
    assert budget is not None
    bins: Bins = []
    for start in range(0, len(order), window):
        opened: Bins = []
        room: list[int] = []
        for sample in order[start : start + window]:
            need = lengths[sample]
            place = next((i for i, free in enumerate(room) if free >= need), len(room))
            if place == len(room):
                opened.append([])
                room.append(budget)
            opened[place].append(sample)
            room[place] -= need
        bins += opened
    return bins


def _fill_last_step(bins: Bins, multiple: int) -> Bins:
    """The bins with their number brought up to a multiple: the largest of the last step are split, then the largest of
    all (the latest, so that the other steps stay as they are); if only single samples are left, the first ones are
    repeated."""
    bins = [list(batch) for batch in bins]
    tail = len(bins) - len(bins) % multiple
    repeat = 0
    while len(bins) % multiple:
        largest = max(range(tail, len(bins)), key=lambda i: len(bins[i]))
        if len(bins[largest]) < 2:
            largest = max(range(len(bins)), key=lambda i: (len(bins[i]), i))
        batch = bins[largest]
        if len(batch) < 2:
            bins.append(list(bins[repeat]))
            repeat += 1
            continue
        bins[largest] = batch[: (len(batch) + 1) // 2]
        bins.append(batch[(len(batch) + 1) // 2 :])
    return bins
