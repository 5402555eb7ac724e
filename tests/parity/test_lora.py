"""Adapters in the packed training path against Hugging Face's own forward of the same adapted model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llava_pdrop.checkpoint.lora import ADAPTER
from llava_pdrop.config.schema import LoraSection
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.adapters import attach_adapters
from llava_pdrop.train.optim import freeze
from llava_pdrop.types import IGNORE_INDEX, PackedBatch
from tests.tiny import DECODERS, make_sample, make_tiny_hf

TOLERANCE = 2e-5  # float32, logits of order 1: sums in another order


def adapted(decoder: str, schedule: Schedule) -> PyramidLlava:
    model = PyramidLlava(make_tiny_hf(decoder), schedule)
    attach_adapters(model.hf, LoraSection(r=4, alpha=8, dropout=0.0), "base")
    freeze(model, ("projector", "language_model"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("schedule", [Schedule(), Schedule((2, 3, 5), (1.0, 1.0, 1.0))], ids=["none", "ratio1"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_without_dropping_it_is_peft_on_vanilla_transformers(decoder, schedule):
    """Loss and the gradient of every adapter."""
    samples = [make_sample(3, (28, 28), 5, "4", seed=1), make_sample((28, 28), 4, (28, 28), "3", seed=2)]
    ours, theirs = adapted(decoder, schedule), adapted(decoder, Schedule())
    loss = ours(PackedBatch.pack(samples)).loss
    loss.backward()
    theirs.hf.set_attn_implementation("eager")
    expected = torch.zeros(())
    for sample in samples:
        pixels = torch.cat([image.pixels for image in sample.images])
        logits = theirs.hf(input_ids=sample.input_ids[None], pixel_values=pixels).logits[0]
        expected = expected + F.cross_entropy(
            logits[:-1], sample.labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"
        )
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=TOLERANCE, rtol=TOLERANCE)
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters()):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            scale = two.grad.abs().max().item()
            torch.testing.assert_close(one.grad, two.grad, atol=1e-4 * scale, rtol=1e-3, msg=name)
    assert all(p.grad is not None for name, p in ours.named_parameters() if ADAPTER.search(name))
