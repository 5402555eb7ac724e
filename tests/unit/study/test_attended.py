"""What is made of recorded weights: means over layers, and the picture of them. (The weights: tests/parity.)"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from llava_pdrop.compare.survivors import Sight
from llava_pdrop.generate.probe import Attended
from llava_pdrop.schedule import Schedule
from llava_pdrop.study.attended import AnswerAttention, allowed, drawn, share_text, spans, weights


def test_a_dropped_token_counts_as_0_in_a_mean() -> None:
    alive_LN = torch.tensor([[True, True], [True, False]])
    found = AnswerAttention(torch.tensor([[[0.2, 0.4], [0.6, 0.0]]]), alive_LN)
    torch.testing.assert_close(found.mean(0, range(2)), torch.tensor([0.4, 0.2]))
    torch.testing.assert_close(found.mean(0, [1]), torch.tensor([0.6, 0.0]))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), [range(0, 8)]),
        (Schedule((2, 4), (0.5, 0.25)), [range(0, 2), range(2, 4), range(4, 8)]),
        (Schedule((0, 4), (0.5, 0.25)), [range(0), range(0, 4), range(4, 8)]),
        (Schedule((2, 4), (0.5, 0.25), inject=2), [range(2, 2), range(2, 4), range(4, 8)]),
    ],
)
def test_stages_are_spans_of_layers(schedule: Schedule, expected: list[range]) -> None:
    assert [list(own) for own in spans(schedule, 8)] == [list(own) for own in expected]


def test_masks_are_read_as_layers_read_them() -> None:
    causal = torch.ones(3, 5, dtype=torch.bool).tril(2)
    assert torch.equal(allowed(None, 3, 5, None), causal) and torch.equal(allowed("flash", 3, 5, None), causal)
    narrow = allowed(None, 3, 5, 2)
    assert narrow.sum(1).tolist() == [2, 2, 2] and (narrow & ~causal).sum() == 0
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    assert torch.equal(allowed(mask, 3, 5, None), causal)
    added = torch.zeros(1, 1, 5, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert torch.equal(allowed(added, 3, 5, None), causal)


def test_weights_are_a_softmax_over_what_is_allowed() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    got = Attended(query, key, 8**-0.5, None, None)
    for window in (None, 2):
        seen = allowed(None, 3, 5, window)
        logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 8**-0.5
        expected = logits[0, :, -3:].masked_fill(~seen, -torch.inf).softmax(-1).mean(0)
        torch.testing.assert_close(weights(got, seen), expected)


def test_the_brightest_patch_has_the_largest_weight_and_dropped_ones_are_dark() -> None:
    sight = Sight(Image.new("RGB", (8, 8), (100, 100, 100)), 4, np.arange(4).reshape(2, 2))
    alive = torch.tensor([True, True, True, False])
    shown = np.asarray(drawn(sight, torch.tensor([0.3, 0.1, 0.0, 0.0]), alive)).astype(int)
    brightness = [shown[y, x, 0] for y, x in ((0, 0), (0, 4), (4, 0), (4, 4))]
    assert brightness[0] > brightness[1] > brightness[2] > 0
    assert len({tuple(colour) for colour in shown[4:, 4:].reshape(-1, 3)}) == 1
    assert shown[0, 0, 0] - shown[0, 0, 2] > 50, "glows in yellow"
    assert drawn(sight, torch.zeros(4), alive).size == (8, 8), "no weight at all is no error"


def test_tokens_that_are_not_drawn_dim_no_patch_and_are_named_in_the_share() -> None:
    """A newline with most of the weight: the brightest patch is the one with the largest weight of those drawn."""
    plain = Sight(Image.new("RGB", (8, 8), (100, 100, 100)), 4, np.arange(4).reshape(2, 2))
    behind = Sight(plain.picture, 4, np.array([[1, 2], [3, -1]]))
    alive_4, alive_5 = torch.ones(4, dtype=torch.bool), torch.tensor([False, True, True, True, True])
    weight = torch.tensor([0.0, 0.1, 0.05, 0.0, 0.4])
    shown, expected = drawn(behind, weight, alive_5), drawn(plain, torch.tensor([0.1, 0.05, 0.0, 0.0]), alive_4)
    for place in ((0, 0), (4, 0), (0, 4)):
        assert shown.getpixel(place) == expected.getpixel(place)
    assert share_text(behind, weight, alive_5) == "55.0% on the picture, 15.0% on the patches drawn"
    assert share_text(plain, torch.tensor([0.1, 0.05, 0.0, 0.0]), alive_4) == "15.0% on the picture"
    none = Sight(plain.picture, 4, np.full((2, 2), -1))
    assert drawn(none, weight, alive_5).size == (8, 8), "nothing that is drawn is no error"
