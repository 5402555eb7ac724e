"""No step of training makes the host wait for the device: `torch.cuda.set_sync_debug_mode("error")`.

The mode sees copies from pageable memory, `.item()`, `nonzero()` and their like, in the forward and in autograd's
threads. Every model runs once before, since a first call builds handles and caches.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import TrainingArguments

from llava_pdrop.data.packing import BatchPlan
from llava_pdrop.model.decoder import run_decoder
from llava_pdrop.model.pyramid_drop import RANKERS
from llava_pdrop.model.schedule import Schedule
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.trainer import PyramidTrainer
from llava_pdrop.types import PackedBatch
from tests.tiny import ANYRES, PYRAMID, make_sample, make_tiny_host, mixed_samples

SCHEDULES = {"vanilla": Schedule(), "dropping": PYRAMID}
BATCHES = {
    "ragged": mixed_samples(ANYRES),
    "equal": [make_sample(3, (28, 28), 5, "4", geometry=ANYRES, seed=seed) for seed in (1, 2)],
    "text only": [make_sample(9, "5", seed=3), make_sample(4, "2", seed=4)],
}
PRECISIONS = ["float32", "bfloat16", "autocast"]


def model_on_gpu(schedule: Schedule, precision: str = "float32", recompute: bool = False) -> PyramidLlava:
    model = PyramidLlava(make_tiny_host("llama_gqa", ANYRES), schedule).train().cuda()
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


@pytest.mark.parametrize("ranker", RANKERS)
def test_decoder_with_every_ranker(no_sync, ranker):
    schedule = Schedule(PYRAMID.layers, PYRAMID.ratios, ranker=ranker)
    model = model_on_gpu(schedule, "bfloat16")
    batch = PackedBatch.pack(BATCHES["ragged"]).to("cuda")
    plan = StreamPlan.build(batch, schedule, ANYRES, model.device)
    x_TD = model.embed(batch, plan).detach()
    for guard in (nullcontext, no_sync):
        with guard():
            out_TD = run_decoder(model.host.model.language_model, x_TD, plan, schedule)
            out_TD.sum().backward()
    assert len(out_TD) == plan.stages[-1].layout.tokens


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_step_of_the_trainer(no_sync, schedule, tmp_path, monkeypatch):
    """From the pinned batch of the loader to the gradients, the loss scaled by the labels of the whole step."""
    samples = [sample for sample in mixed_samples(ANYRES) for _ in range(4)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, gradient_accumulation_steps=2, bf16=True, disable_tqdm=True,
        report_to="none", save_strategy="no", logging_steps=1,
    )  # fmt: skip
    lengths = [len(sample.input_ids) for sample in samples]
    plan = BatchPlan(lengths, gradient_accumulation=2, samples_per_batch=3, shuffle=False)
    rates = {"language_model": 1e-3, "projector": 1e-3, "vision_tower": 1e-3}
    trainer = PyramidTrainer(model_on_gpu(SCHEDULES[schedule]), args, samples, plan, rates)
    step, guarded = trainer.training_step, []

    def training_step(*arguments, **options):
        if trainer.state.global_step == 0:
            return step(*arguments, **options)
        guarded.append(trainer.state.global_step)
        with no_sync():
            return step(*arguments, **options)

    monkeypatch.setattr(trainer, "training_step", training_step)
    trainer.train()
    assert guarded == [1, 1, 2, 2]
    assert all(row["loss"] > 0 for row in trainer.state.log_history if "loss" in row)
