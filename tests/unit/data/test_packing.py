"""Batch plans: everything once per epoch, the same on every rank, within the budget, the same again next time."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llava_pdrop.data.packing import BatchPlan, PlanSampler
from llava_pdrop.errors import UserError
from tests.messages import says
from tests.properties import cases, one_line

LENGTHS = np.random.default_rng(3).integers(20, 900, size=203).tolist()
SIZES = [{"samples_per_batch": 4}, {"tokens_per_batch": 2000}]
SPREADS = [(1, 1), (1, 8), (3, 2), (8, 1), (8, 4)]


def everything(plan, epoch=0):
    return [plan.micro_batches(epoch, rank) for rank in range(plan.world_size)]


def repeats(plan):
    """Samples that the first epoch shows a second time."""
    return sum(len(batch) for rank in everything(plan) for batch in rank) - len(plan.lengths)


@pytest.mark.parametrize("size", SIZES, ids=["samples", "tokens"])
@pytest.mark.parametrize(("world_size", "accumulation"), SPREADS)
def test_every_sample_once_and_every_rank_alike(size, world_size, accumulation):
    plan = BatchPlan(LENGTHS, seed=5, world_size=world_size, gradient_accumulation=accumulation, **size)
    for epoch in (0, 1):
        ranks = everything(plan, epoch)
        seen = Counter(chain.from_iterable(chain.from_iterable(ranks)))
        assert seen == Counter(range(len(LENGTHS))) and repeats(plan) == 0
        assert {len(batches) for batches in ranks} == {plan.batches_per_rank}
        assert plan.batches_per_rank == plan.steps * accumulation
        assert all(batch for batches in ranks for batch in batches)


@pytest.mark.parametrize("size", SIZES, ids=["samples", "tokens"])
def test_deterministic_and_shuffled(size):
    plan = BatchPlan(LENGTHS, seed=5, world_size=2, **size)
    again = BatchPlan(list(LENGTHS), seed=5, world_size=2, **size)
    assert plan.micro_batches(3, 1) == again.micro_batches(3, 1)
    assert plan.micro_batches(3, 1) != plan.micro_batches(4, 1)
    assert plan.micro_batches(3, 1) != BatchPlan(LENGTHS, seed=6, world_size=2, **size).micro_batches(3, 1)
    flat = list(chain.from_iterable(plan.micro_batches(0)))
    assert flat != sorted(flat)


def test_the_first_batches_are_these():
    """Pins the shuffling itself, on which comparisons of runs made at different times rest."""
    assert BatchPlan([10] * 9, seed=0, samples_per_batch=3).micro_batches(0) == [
        [4, 5, 2],
        [6, 3, 8],
        [7, 0, 1],
    ]
    assert BatchPlan(range(1, 10), seed=0, tokens_per_batch=12).micro_batches(0) == [
        [3, 7],
        [4, 5, 0],
        [2, 6, 1],
        [8],
    ]


def test_a_step_takes_the_same_samples_however_many_ranks_share_it():
    """But for the last two steps, whose samples are spread so that every rank has one."""

    def steps(world_size, accumulation, samples):
        plan = BatchPlan(LENGTHS, world_size=world_size, gradient_accumulation=accumulation, samples_per_batch=samples)
        ranks = everything(plan)
        return [
            sorted(chain.from_iterable(batch for rank in ranks for batch in rank[i : i + accumulation]))
            for i in range(0, plan.batches_per_rank, accumulation)
        ][:-2]

    assert steps(1, 1, 8) == steps(4, 1, 2) == steps(2, 2, 2) == steps(8, 1, 1) == steps(1, 8, 1)


def test_token_budget():
    plan = BatchPlan(LENGTHS, tokens_per_batch=1000, world_size=2)
    batches = list(chain.from_iterable(everything(plan)))
    loads = [sum(LENGTHS[i] for i in batch) for batch in batches]
    assert max(loads) <= 1000
    assert sum(loads) / len(loads) > 850


def test_order_is_kept_without_shuffling():
    plan = BatchPlan(LENGTHS, samples_per_batch=4, shuffle=False)
    assert list(chain.from_iterable(plan.micro_batches(7))) == list(range(len(LENGTHS)))


def test_single_samples_are_repeated_only_if_nothing_can_be_split():
    plan = BatchPlan([5] * 10, samples_per_batch=1, world_size=4)
    seen = Counter(chain.from_iterable(chain.from_iterable(everything(plan))))
    assert repeats(plan) == 2 and sum(seen.values()) == 12 and len(seen) == 10 and max(seen.values()) == 2
    two = BatchPlan([5, 5], samples_per_batch=2, world_size=8)
    assert two.steps == 1 and repeats(two) == 6 and {len(rank) for rank in everything(two)} == {1}
    assert repeats(BatchPlan([5] * 10, samples_per_batch=2, world_size=4)) == 0


def test_ranks_of_a_step_have_similar_loads():
    plan = BatchPlan(LENGTHS, samples_per_batch=1, world_size=2, gradient_accumulation=8)
    first, second = ([sum(LENGTHS[i] for i in batch) for batch in rank] for rank in everything(plan))
    mean_gap = np.abs(np.subtract(first, second)).mean()
    assert mean_gap < np.std(LENGTHS) / 3


def test_sampler():
    plan = BatchPlan(LENGTHS, samples_per_batch=4, world_size=2)
    sampler = PlanSampler(plan, rank=1)
    assert list(sampler) == plan.micro_batches(0, 1) and len(sampler) == len(list(sampler))
    sampler.set_epoch(2)
    assert list(sampler) == plan.micro_batches(2, 1) and len(sampler) == len(list(sampler))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": [], "samples_per_batch": 1}, says("empty")),
        ({"lengths": [1]}, says("either", "samples_per_batch", "tokens_per_batch")),
        (
            {"lengths": [1], "samples_per_batch": 1, "tokens_per_batch": 1},
            says("either", "samples_per_batch", "tokens_per_batch"),
        ),
        ({"lengths": [1], "samples_per_batch": 0}, says("samples_per_batch", "at least 1")),
        ({"lengths": [1], "samples_per_batch": 1, "world_size": 0}, says("world_size", "at least 1")),
        ({"lengths": [3, 50], "tokens_per_batch": 10}, says("sample 1", "50 tokens", "tokens_per_batch=10")),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(**arguments)


def test_no_such_rank():
    with pytest.raises(ValueError, match=says("rank 2", "of 2")):
        BatchPlan([1, 2], samples_per_batch=1, world_size=2).micro_batches(0, 2)


@hypothesis.given(st.data())
@cases
def test_any_plan_has_every_sample_and_all_ranks_alike_or_is_one_line(data):
    lengths = data.draw(st.lists(st.integers(-1, 60), max_size=40))
    number = st.one_of(st.none(), st.integers(-1, 9))
    options = {
        "seed": data.draw(st.integers(0, 2**31)),
        "world_size": data.draw(st.integers(0, 5)),
        "gradient_accumulation": data.draw(st.integers(0, 4)),
        "samples_per_batch": data.draw(number),
        "tokens_per_batch": data.draw(st.one_of(st.none(), st.integers(-1, 200))),
        "window": data.draw(st.integers(-1, 12)),
        "shuffle": data.draw(st.booleans()),
    }
    try:
        plan = BatchPlan(lengths, **options)
    except UserError as error:
        one_line(error)
        return
    for epoch in data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=2)):
        ranks = everything(plan, epoch)
        seen = Counter(chain.from_iterable(chain.from_iterable(ranks)))
        assert set(seen) == set(range(len(lengths))) and sum(seen.values()) == len(lengths) + repeats(plan)
        assert {len(batches) for batches in ranks} == {plan.batches_per_rank}
        assert plan.batches_per_rank == plan.steps * plan.gradient_accumulation
        for batch in chain.from_iterable(ranks):
            assert batch
            if plan.tokens_per_batch is not None:
                assert sum(lengths[sample] for sample in batch) <= plan.tokens_per_batch
            else:
                assert len(batch) <= plan.samples_per_batch
