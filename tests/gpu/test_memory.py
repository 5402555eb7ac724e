"""The predicted peak of a training step against what the allocator saw, at a shape of half a billion parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig

from llava_pdrop.checkpoint.hf_models import make_hf_model
from llava_pdrop.cost.flops import ALL_LAYERS, CountedStep, Recomputed
from llava_pdrop.cost.memory import predicted_peak
from llava_pdrop.cost.states import States
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch
from tests.gpu.peaks import assert_predicted, cublas_workspaces
from tests.tiny import IMAGE, make_sample

TEXT = dict(
    vocab_size=32064, hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, num_attention_heads=16,
    max_position_embeddings=4096,
)  # fmt: skip
VISION = dict(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8, image_size=336, patch_size=14
)
GEOMETRY = ImageGeometry(336, 14, "anyres", "flat", ((672, 672),))  # 5 tiles of 576 tokens: 2,880
PARTS = ("projector", "language_model", "vision_tower")
STATES = States(bytes=2, optimizer=4.0)  # AdamW on bfloat16 weights: two bfloat16 moments


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule((2, 4, 6), (0.5, 0.25, 0.125))], ids=["vanilla", "dropping"])
def test_peak_is_predicted_within_a_tenth(schedule, recompute):
    torch.manual_seed(0)
    hf = make_hf_model(LlamaConfig(**TEXT), CLIPVisionConfig(**VISION), GEOMETRY, IMAGE).to("cuda", torch.bfloat16)
    model = PyramidLlava(hf, schedule, GEOMETRY, kernels="eager").train()  # what the formula is for
    if recompute:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = PackedBatch.pack([make_sample(20, (672, 672), 100, "30", geometry=GEOMETRY, seed=i) for i in range(4)])
    predicted = predicted_peak(
        CountedStep(hf.config, batch, schedule, GEOMETRY, PARTS, ALL_LAYERS if recompute else Recomputed()), STATES
    ).total
    batch = batch.to("cuda")
    for _ in range(2):  # the first step makes the optimizer's state
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        output = model(batch)
        (output.loss / output.labels).backward()
        optimizer.step()
        del output
    peak = torch.cuda.max_memory_allocated()
    assert_predicted([peak], [predicted], cublas_workspaces() + batch.pixels.nbytes)
