"""Stopwatches: every part of a step is measured once."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.runtime.clock import TIME_PARTS, Span, StepClock, Stopwatch, instrumented, quartiles
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
    with clock.region("forward"):
        output = model(PackedBatch.pack(mixed_samples()))
    entered = [name for name, _, _ in clock._closed]
    assert entered == ["tower", "ranking", "ranking", "ranking", "decoder", "forward"]
    with clock.region("backward"):
        output.loss.backward()
    assert [name for name, _, _ in clock._closed][len(entered):] == ["backward"]  # fmt: skip
    whole = sum(stop.wall - start.wall for name, start, stop in clock._closed if name in ("forward", "backward"))
    seconds = clock.drain()
    assert sum(seconds.values()) == pytest.approx(whole) and all(value > 0 for value in seconds.values())
    assert set(seconds) == set(TIME_PARTS) - {"optimizer"}
    assert clock.drain() == {}


def test_a_stopwatch_adds_up_what_comes_again(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    watch = Stopwatch(CPU)
    with watch.region("step"):
        for _ in range(2):
            assert not watch.is_open("layer")
            with watch.region("layer"):
                assert watch.is_open("layer") and watch.is_open("step")
    watch.stop("never begun")
    assert watch.read(["step", "head"]) == {"step": Span(5.0, 0.0), "head": Span(0.0, 0.0), "layer": Span(2.0, 0.0)}
    assert watch.read() == {}
    watch.start("step")
    watch.clear()
    watch.stop("step")
    assert watch.read() == {}


def test_what_a_span_costs_is_processor_time_where_it_is_known():
    assert (Span(3.0, 1.0) + Span(1.0, 0.5)).cost == 1.5
    assert (Span(3.0, None) + Span(1.0, None)).cost == 4.0


def test_hooks_are_taken_away_again_when_a_forward_fails():
    model = PyramidLlava(make_tiny_hf(), PYRAMID)
    layers = model.hf.model.language_model.layers
    layers[1].register_forward_pre_hook(lambda *_: [][0])
    with pytest.raises(IndexError), instrumented(model, Stopwatch(CPU)):
        model(PackedBatch.pack(mixed_samples()))
    assert sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()) == 1


def test_quartiles() -> None:
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 3.0, 4.0)
