"""Whole training steps in mixed precision: float32 weights, bfloat16 autocast, AdamW."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch
from tests.tiny import ANYRES, PYRAMID, make_tiny_hf, mixed_samples

STEPS = 20


def loss_of(model: PyramidLlava, batch: PackedBatch) -> torch.Tensor:
    output = model(batch)
    return output.loss / output.labels


@pytest.mark.parametrize(
    ("schedule", "tolerance"),
    [(Schedule(), 0.02), (PYRAMID, 0.1)],  # rounding may swap tokens at the edge of the budget
    ids=["vanilla", "dropping"],
)
def test_loss_starts_where_float32_does_and_falls(schedule, tolerance):
    batch = PackedBatch.pack(mixed_samples(ANYRES))
    with torch.no_grad():
        expected = loss_of(PyramidLlava(make_tiny_hf("llama_gqa", ANYRES), schedule), batch).item()
    model = PyramidLlava(make_tiny_hf("llama_gqa", ANYRES), schedule).train().cuda()
    model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch, losses = batch.to("cuda"), []
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(expected, rel=tolerance)
    assert losses[-1] < 0.5 * losses[0] and all(loss == loss for loss in losses)
