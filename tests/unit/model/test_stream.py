"""Layouts and plans: plain arithmetic on the host, and a batch in which dropping leaves nothing before an answer."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import accumulate, chain, pairwise

import numpy as np
import pytest
import torch

from llava_pdrop.generate.prefill import Prefill
from llava_pdrop.model.stream import Layout, StreamPlan
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import IGNORE_INDEX, PackedBatch, Sample
from tests.messages import says
from tests.parity.test_export import sources  # noqa: F401
from tests.tiny import ANYRES, PAD, make_sample, make_tiny_hf, mixed_samples

SCHEDULE = Schedule(layers=(1, 2), ratios=(0.5, 0.2))


def test_text_positions_move_with_the_images_before_them():
    batch = PackedBatch.pack([make_sample(2, (28, 28), 3, "2"), make_sample((28, 28), 1, (28, 28), "1", seed=1)])
    layout = Layout.of(batch)
    after = layout.after_drop([8, 0, 16])
    assert after.seq_lens == [24 - 8, 35 - 16]
    assert after.image_spans == [(3, 11), (17, 17), (18, 34)]
    assert after.answer_starts == [[14], [34]]
    assert after.label_positions == [14, 15, 34]
    assert (after.tokens, after.image_tokens) == (35, 24)


@pytest.mark.parametrize("seed", range(100))
def test_a_drop_moves_every_position_by_what_is_gone_before_it(seed):
    """Against the plain definition: of all positions, those of the tokens that stay are counted."""
    chance = random.Random(seed)
    batch = random_batch(chance)
    layout = Layout.of(batch)
    for _ in range(3):
        kept = [chance.randint(0, stop - start) for start, stop in layout.image_spans]
        gone = {p for (start, stop), k in zip(layout.image_spans, kept) for p in range(start + k, stop)}
        stays = [p not in gone for p in range(layout.tokens)]
        place = [sum(stays[:p]) for p in range(layout.tokens + 1)]
        after = layout.after_drop(kept)
        ends = [sum(layout.seq_lens[:number]) for number in range(len(layout.seq_lens) + 1)]
        assert after.seq_lens == [place[stop] - place[start] for start, stop in pairwise(ends)]
        spans = [(place[start], place[start] + k) for (start, _), k in zip(layout.image_spans, kept)]
        assert after.image_spans == spans
        assert after.answer_starts == [[place[p] for p in sample] for sample in layout.answer_starts]
        assert after.label_positions == [place[p] for p in layout.label_positions]
        assert (after.image_totals, after.droppable) == (layout.image_totals, layout.droppable)
        numbers = chain(after.seq_lens, after.label_positions, *after.answer_starts, *after.image_spans)
        assert all(type(number) is int for number in numbers)  # and none is numpy's
        layout = after


def random_batch(chance: random.Random) -> PackedBatch:
    """1 to 4 samples of up to 7 pieces: text, answers and pictures, also none of them, or one right behind another."""
    samples = []
    for number in range(chance.randint(1, 4)):
        pieces = [
            chance.choice([chance.randint(1, 9), str(chance.randint(1, 5)), (28, 28), (50, 20)])
            for _ in range(chance.randint(0, 7))
        ]
        samples.append(make_sample(*pieces, geometry=ANYRES, seed=number))
    return PackedBatch.pack(samples, query=chance.choice(["answers", "last"]))


def test_indices_are_sent_from_pinned_memory_without_waiting(monkeypatch):
    """In training and before a prefill: a copy from ordinary memory makes the host wait. (No GPU is needed to see what
    would be asked of one.)"""
    pinned, sent = [], []

    def pin_memory(tensor):
        pinned.append(tensor)
        return tensor

    def to(tensor, *arguments, **options):
        if options:
            sent.append((any(tensor is one for one in pinned), str(arguments[0]), options))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    picture = np.array([[-1, 0, 0, -1], [-1, 1, 1, -1]])
    Prefill.build(picture, np.ones_like(picture, dtype=bool), None, Schedule((1,), (0.5,)), torch.device("cuda"))
    assert sent == [(True, "cuda", {"non_blocking": True})]


def test_budgets_are_taken_from_the_original_count():
    batch = PackedBatch.pack(mixed_samples(ANYRES))
    plan = StreamPlan.build(batch, SCHEDULE, ANYRES, torch.device("cpu"))
    whole = [stop - start for start, stop in batch.image_spans]
    last = [stop - start for start, stop in plan.stages[-1].layout.image_spans]
    assert last == [n if i == 3 else int(n * 0.2) for i, n in enumerate(whole)]
    assert plan.image_tokens[0] == sum(whole)


def test_positions_restart_in_every_sample_and_stage():
    batch = PackedBatch.pack(mixed_samples())
    for stage in StreamPlan.build(batch, SCHEDULE, PAD, torch.device("cpu")).stages:
        expected = [i for length in stage.layout.seq_lens for i in range(length)]
        assert stage.position_T.tolist() == expected
        assert stage.segments.offsets.dtype == torch.int32
        assert stage.segments.offsets.diff().tolist() == stage.layout.seq_lens


def test_inference_ranks_with_the_last_token():
    samples = mixed_samples()
    plan = StreamPlan.build(PackedBatch.pack(samples, query="last"), SCHEDULE, PAD, torch.device("cpu"))
    for stage in plan.stages:
        ends = torch.tensor(stage.layout.seq_lens).cumsum(0) - 1
        assert stage.instruction.row_Q.tolist() == ends.tolist()


def test_the_text_that_asks_stands_between_the_last_picture_and_the_last_query():
    samples = [
        make_sample(3, (28, 28), 2, (28, 28), 3, "2", 2, "4"),  # the first answer is not asked with
        make_sample(4, "2"),
        make_sample(2, (28, 28), "3"),  # nothing between: the query itself, a token of the picture
        make_sample(2, (28, 28), 5),
    ]
    schedule = replace(SCHEDULE, ranker="all_text")
    plan = StreamPlan.build(PackedBatch.pack(samples), schedule, PAD, torch.device("cpu"))
    lost = [(0, 0, 0), (16, 16, 8), (26, 26, 13)]
    for stage, (first, second, third) in zip(plan.stages, lost):
        assert stage.text.counts == [5, 0, 1, 0]
        expected = [38 - first, 39 - first, 40 - first, 43 - second, 44 - second, 74 - second - third]
        assert stage.text.row_Q.tolist() == expected
    last = StreamPlan.build(PackedBatch.pack(samples[3:], query="last"), schedule, PAD, torch.device("cpu"))
    assert last.stages[0].text.row_Q.tolist() == [19, 20, 21, 22, 23]


def test_a_cut_image_uses_the_first_features():
    whole = make_sample(2, (28, 28), "1")
    cut = Sample("cut", whole.input_ids[:9], torch.full((9,), IGNORE_INDEX), whole.images, ((3, 9),))
    plan = StreamPlan.build(PackedBatch.pack([cut, whole]), Schedule(), PAD, torch.device("cpu"))
    assert plan.feature_row.tolist() == [*range(6), *range(16, 32)]
    assert plan.image_row.tolist() == [*range(3, 9), *range(12, 28)]


def test_too_many_placeholders_are_an_error():
    sample = make_sample(2, (28, 28), "1")
    wrong = Sample("wrong", sample.input_ids, sample.labels, sample.images, ((2, 19),))
    with pytest.raises(ValueError, match=says("28x28", "17 placeholders", "16 features")):
        StreamPlan.build(PackedBatch.pack([wrong]), Schedule(), PAD, torch.device("cpu"))


def test_packing_refuses_a_supervised_first_token():
    ids = torch.tensor([5, 6])
    with pytest.raises(ValueError, match=says("sample first", "supervised")):
        PackedBatch.pack([Sample("first", ids, ids)])
    with pytest.raises(ValueError, match=says("empty")):
        PackedBatch.pack([])


TO_NOTHING = Schedule((2, 4), (0.5, 0.0))


def without_bos(sample: Sample) -> Sample:
    spans = tuple((start - 1, stop - 1) for start, stop in sample.image_spans)
    return Sample(sample.id, sample.input_ids[1:], sample.labels[1:], sample.images, spans)


@pytest.mark.parametrize("images", [1, 2])
def test_an_image_that_alone_predicts_the_answer_keeps_a_token(images):
    first = without_bos(make_sample(*[(28, 28)] * images, "3", seed=1))
    others = [make_sample(4, (28, 28), 3, "2", seed=2), make_sample(5, "4", seed=3)]
    model = PyramidLlava(make_tiny_hf(), TO_NOTHING)
    alone = model(PackedBatch.pack([first])).loss
    for before in (others[:1], others):
        batch = PackedBatch.pack([*before, first])
        rest = model(PackedBatch.pack(before)).loss
        torch.testing.assert_close(model(batch).loss - rest, alone, atol=1e-4, rtol=1e-5)
        check_rows_lie_in_their_sample(batch)
    check_rows_lie_in_their_sample(PackedBatch.pack([first, *others]))


def check_rows_lie_in_their_sample(batch: PackedBatch) -> None:
    plan = StreamPlan.build(batch, TO_NOTHING, PAD, torch.device("cpu"))
    original_ends = list(accumulate(batch.seq_lens))
    owners = [sum(end <= position for end in original_ends) for position in batch.label_positions]
    for stage in plan.stages:
        ends = list(accumulate(stage.layout.seq_lens))
        spans = [(end - length, end) for end, length in zip(ends, stage.layout.seq_lens)]
        queries = [sample for sample, starts in enumerate(batch.answer_starts) for _ in starts]
        for row, sample in zip(stage.instruction.row_Q.tolist(), queries, strict=True):
            assert spans[sample][0] <= row < spans[sample][1]
        for position, sample in zip(stage.layout.label_positions, owners, strict=True):
            assert spans[sample][0] <= position - 1 < spans[sample][1]
    expected = [position - 1 for position in plan.stages[-1].layout.label_positions]
    assert plan.predict_row.tolist() == expected
