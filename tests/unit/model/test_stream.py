"""Layouts and plans: plain arithmetic on the host."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.model.schedule import Schedule
from llava_pdrop.model.stream import Layout, StreamPlan
from llava_pdrop.types import IGNORE_INDEX, PackedBatch, Sample
from tests.tiny import ANYRES, PAD, make_sample, mixed_samples

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
        assert stage.query_Q.tolist() == ends.tolist()


def test_a_cut_image_uses_the_first_features():
    whole = make_sample(2, (28, 28), "1")
    cut = Sample("cut", whole.input_ids[:9], torch.full((9,), IGNORE_INDEX), whole.images, ((3, 9),))
    plan = StreamPlan.build(PackedBatch.pack([cut, whole]), Schedule(), PAD, torch.device("cpu"))
    assert plan.feature_row.tolist() == [*range(6), *range(16, 32)]
    assert plan.image_row.tolist() == [*range(3, 9), *range(12, 28)]


def test_too_many_placeholders_are_an_error():
    sample = make_sample(2, (28, 28), "1")
    wrong = Sample("wrong", sample.input_ids, sample.labels, sample.images, ((2, 19),))
    with pytest.raises(ValueError, match="28x28 pixels has 17 placeholders, but only 16 features"):
        StreamPlan.build(PackedBatch.pack([wrong]), Schedule(), PAD, torch.device("cpu"))


def test_packing_refuses_a_supervised_first_token():
    ids = torch.tensor([5, 6])
    with pytest.raises(ValueError, match="sample first: its first token is supervised"):
        PackedBatch.pack([Sample("first", ids, ids)])
    with pytest.raises(ValueError, match="empty list"):
        PackedBatch.pack([])
