"""Which tokens survive on the GPU: the same as on the CPU, also where scores are equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_pdrop.model.pyramid_drop import keep_index
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch
from tests.tiny import PAD

SCHEDULE = Schedule((1,), (0.3,))
IMAGES = [2880, 1, 576, 576, 37]


def candidates(device: str):
    """Of a stream of five samples with one image each: 10 tokens of text, the image, 20 tokens of text."""
    first, spans, starts = 0, [], []
    for length in IMAGES:
        spans.append((first + 10, first + 10 + length))
        starts.append([first + length + 25])
        first += length + 30
    layout = PackedBatch(
        input_ids=torch.empty(0, dtype=torch.int64), labels=torch.empty(0, dtype=torch.int64), pixels=torch.empty(0),
        seq_lens=[length + 30 for length in IMAGES], image_spans=spans, image_sizes=[], answer_starts=starts,
        label_positions=[],
    )  # fmt: skip
    stage = StreamPlan.build(layout, SCHEDULE, replace(PAD, tile=1, patch=1), torch.device(device)).stages[0]
    return stage.candidates, stage.layout.tokens


@pytest.mark.parametrize("levels", [1, 3, 50], ids=lambda n: f"{n} different scores")
def test_equal_scores_keep_the_earlier_token_as_on_the_cpu(levels):
    score = torch.randint(levels, (sum(IMAGES),), generator=torch.Generator().manual_seed(0)) / levels
    expected = keep_index(score, *candidates("cpu"))
    assert len(expected) == sum(30 + SCHEDULE.kept(length, 0) for length in IMAGES)
    for _ in range(5):
        assert torch.equal(keep_index(score.cuda(), *candidates("cuda")).cpu(), expected)
