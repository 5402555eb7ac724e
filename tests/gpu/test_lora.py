"""QLoRA: bitsandbytes' weights under peft's adapters, in a packed step with drops."""

from __future__ import annotations

import pytest
import torch

from llava_pdrop.checkpoint.lora import ADAPTER
from llava_pdrop.config.schema import LoraSection
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.train.adapters import attach_adapters, halve_frozen
from llava_pdrop.train.optim import freeze
from llava_pdrop.types import PackedBatch
from tests.tiny import ANYRES, PYRAMID, make_tiny_hf, mixed_samples

CUDA = torch.device("cuda")
STEPS = 20


def model_of(bits: int | None) -> PyramidLlava:
    model = PyramidLlava(make_tiny_hf("llama_gqa", ANYRES), PYRAMID)
    attach_adapters(model.hf, LoraSection(r=8, alpha=16, bits=bits), "base", CUDA, torch.bfloat16)
    freeze(model, ("projector", "language_model"))
    halve_frozen(model, torch.bfloat16)
    return model.train().to(CUDA)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_adapters_learn_on_weights_that_stay(bits):
    if bits is not None:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
    model, batch = model_of(bits), PackedBatch.pack(mixed_samples(ANYRES)).to(CUDA)
    weight = model.hf.model.language_model.layers[0].mlp.up_proj.base_layer.weight
    assert weight.dtype == {None: torch.bfloat16, 4: torch.uint8, 8: torch.int8}[bits]
    before = weight.detach().clone()
    model.activation_checkpointing_enable()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(learning, lr=3e-3), []
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.bfloat16):
            output = model(batch)
            loss = output.loss / output.labels
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0] and all(map(torch.isfinite, map(torch.tensor, losses)))
    assert torch.equal(weight, before)
    adapters = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    assert adapters and all(parameter.dtype == torch.float32 and parameter.abs().max() > 0 for parameter in adapters)
    assert {parameter.dtype for name, parameter in model.named_parameters() if ADAPTER.search(name)} == {torch.float32}
