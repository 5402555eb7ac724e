"""No step of training makes the host wait for the device: `torch.cuda.set_sync_debug_mode("error")`.

The mode sees copies from pageable memory, `.item()`, `nonzero()` and their like, in the forward and in autograd's
threads. Every model runs once before, since a first call builds handles and caches.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from llava_pdrop.model.decoder import run_decoder
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch
from tests.sync import make_trainer, train_forbidding_reads
from tests.tiny import ANYRES, PYRAMID, make_sample, make_tiny_hf, mixed_samples

SCHEDULES = {"vanilla": Schedule(), "dropping": PYRAMID}
BATCHES = {
    "ragged": mixed_samples(ANYRES),
    "equal": [make_sample(3, (28, 28), 5, "4", geometry=ANYRES, seed=seed) for seed in (1, 2)],
    "text only": [make_sample(9, "5", seed=3), make_sample(4, "2", seed=4)],
}
PRECISIONS = ["float32", "bfloat16", "autocast"]


def model_on_gpu(schedule: Schedule, precision: str = "float32", recompute: bool = False) -> PyramidLlava:
    model = PyramidLlava(make_tiny_hf("llama_gqa", ANYRES), schedule).train().cuda()
    if recompute:
        model.activation_checkpointing_enable()
    return model.bfloat16() if precision == "bfloat16" else model


def autocast(precision: str):
    return torch.autocast("cuda", torch.bfloat16) if precision == "autocast" else nullcontext()


def test_the_guard_catches_a_read_from_the_device(no_sync):
    number = torch.ones(1, device="cuda")
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()
    assert number.item() == 1  # and is off again


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_forward_and_backward(no_sync, schedule, batch, precision, recompute):
    model = model_on_gpu(SCHEDULES[schedule], precision, recompute)
    batch = PackedBatch.pack(BATCHES[batch]).to("cuda")
    for guard in (nullcontext, no_sync):
        with guard(), autocast(precision):
            output = model(batch)
            (output.loss / output.labels).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("more", [{}, {"inject": 1, "merge": "nearest"}], ids=["", "late and merged"])
@pytest.mark.parametrize("ranker", RANKERS)
def test_decoder_with_every_ranker(no_sync, ranker, more):
    schedule = Schedule(PYRAMID.layers, PYRAMID.ratios, ranker=ranker, **more)
    model = model_on_gpu(schedule, "bfloat16")
    batch = PackedBatch.pack(BATCHES["ragged"]).to("cuda")
    plan = StreamPlan.build(batch, schedule, ANYRES, model.device)
    x_TD = model.embed(batch, plan).detach()
    for guard in (nullcontext, no_sync):
        with guard():
            out_TD = run_decoder(model.hf.model.language_model, x_TD, plan, schedule)
            out_TD.sum().backward()
    assert len(out_TD) == plan.stages[-1].layout.tokens


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_step_of_the_trainer(no_sync, sync_allowed, schedule, tmp_path):
    """From the pinned batch of the loader to the gradients, the loss scaled by the labels of the whole step. The guard
    alone waits, once an optimizer step. (Without a GPU: tests/unit/train/test_trainer.py.)"""
    trainer = make_trainer(model_on_gpu(SCHEDULES[schedule]), tmp_path)
    train_forbidding_reads(trainer, no_sync, sync_allowed)


def test_only_what_is_allowed_may_wait(no_sync, sync_allowed):
    number = torch.ones(1, device="cuda")
    with no_sync():
        with sync_allowed():
            assert number.item() == 1
        with pytest.raises(RuntimeError, match="synchroniz"):
            number.item()
