"""Stopwatches: every part of a step is measured once."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.runtime.clock import TIME_PARTS, StepClock, quartiles
from llava_pdrop.types import PackedBatch
from tests.tiny import PYRAMID, make_tiny_hf, mixed_samples

CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_of_a_step_is_measured_once(checkpointing, monkeypatch):
    """A clock that ticks at every look at it: a part that is entered n times has n ticks or more; recomputed layers in
    the backward pass are not taken for another forward."""
    model = PyramidLlava(make_tiny_hf(), PYRAMID).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    clock = StepClock(model, CPU)
    clock.forward_begins()
    output = model(PackedBatch.pack(mixed_samples()))
    clock.forward_ends()
    entered = [name for name, _, _ in clock._closed]
    assert entered == ["tower", "ranking", "ranking", "ranking", "decoder", "forward"]
    clock.begins("backward")
    output.loss.backward()
    clock.ends("backward")
    assert [name for name, _, _ in clock._closed][len(entered):] == ["backward"]  # fmt: skip
    whole = sum(stop - start for name, start, stop in clock._closed if name in ("forward", "backward"))
    seconds = clock.drain()
    assert sum(seconds.values()) == pytest.approx(whole) and all(value > 0 for value in seconds.values())
    assert set(seconds) == set(TIME_PARTS) - {"optimizer"}
    assert clock.drain() == {}


def test_quartiles() -> None:
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
