"""Bytes of each engine by hand, for a LLaVA of five thousand parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llava_pdrop.cost.flops import ALL_LAYERS, CountedStep, Recomputed
from llava_pdrop.cost.memory import Memory, Parameters, cpu_memory, predicted_peak
from llava_pdrop.cost.states import GATHERED, States
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import ImageInput, PackedBatch, Sample
from tests.messages import says

CONFIG = LlavaConfig(
    text_config=LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
        tie_word_embeddings=False,
    ),
    vision_config=CLIPVisionConfig(
        hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    ),
)  # fmt: skip
DECODER = ("projector", "language_model")

LAYER = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8  # q, k, v, o; gate, up, down; two norms: 656
LEARNING = 100 * 8 + 2 * LAYER + 8 + 100 * 8 + (4 + 1) * 8 + (8 + 1) * 8  # embedding, norm, head, projector: 3032
TOWER_LAYER = 4 * (4 * 4 + 4) + 4 * 8 + 8 + 8 * 4 + 4 + 4 * 4  # four maps, two of the MLP, two norms: 172
STEM = 3 * 4 * 4 * 4 + 4 + 5 * 4 + 4 * 4  # patches, class token, positions, two norms: 232
FROZEN = 2 * TOWER_LAYER + STEM

BF16 = States(gpus=4)
"""Half-precision weights beside float32 states: what DeepSpeed keeps, here of nothing that is sharded."""
DDP = States(gpus=4, optimizer=8, float32=True, autocast=True, buckets=4)
FSDP2 = States(zero=3, gpus=4, optimizer=8, float32=True, layerwise=True)


def peak(states: States, checkpointing: bool = False) -> Memory:
    labels = torch.full((7,), -100)
    labels[-1] = 5
    pixels = ImageInput(torch.zeros(1, 3, 8, 8), (8, 8))
    batch = PackedBatch.pack([Sample("s", torch.full((7,), 5), labels, (pixels,), ((1, 5),))])
    again = ALL_LAYERS if checkpointing else Recomputed()
    return predicted_peak(CountedStep(CONFIG, batch, Schedule(), ImageGeometry(8, 4), DECODER, again), states)


def test_parameters_by_hand():
    assert Parameters.of(CONFIG).total(CONFIG) == LEARNING + FROZEN


ALL = LEARNING + FROZEN


@pytest.mark.parametrize(
    ("states", "weights", "gathered", "gradients", "optimizer"),
    [
        (replace(DDP, gpus=1, buckets=0, accumulate=True), 4 * ALL, 0, 4 * LEARNING, 8 * LEARNING),
        (replace(BF16, zero=2), 2 * ALL, 0, 2 * LEARNING / 4, 12 * LEARNING / 4),
        (replace(BF16, zero=3), 2 * ALL / 4, 2 * ALL, 2 * LEARNING / 4, 12 * LEARNING / 4),
        (replace(BF16, zero=3, gpus=1), 2 * ALL, 2 * ALL, 6 * LEARNING, 12 * LEARNING),  # the step, its float32 copy
    ],
    ids=["one GPU", "zero2", "zero3", "zero3 on one GPU"],
)
def test_bytes_of_a_parameter(states, weights, gathered, gradients, optimizer):
    found = peak(states)
    assert ALL < GATHERED
    assert (found.weights, found.gathered, found.gradients) == (weights, gathered, gradients)
    assert found.optimizer == optimizer


def test_ddp_has_all_on_every_gpu_and_its_buckets_besides():
    found = peak(replace(DDP, accumulate=True))
    assert found.weights + found.optimizer == 4 * FROZEN + 12 * LEARNING
    assert found.gradients == (4 + 4) * LEARNING
    assert peak(replace(DDP, gpus=8, accumulate=True)) == found  # more GPUs change nothing


def test_fsdp2_gathers_a_layer_and_the_next_and_keeps_whole_gradients_while_accumulating():
    found = peak(FSDP2)
    assert found.weights == 4 * (LEARNING + FROZEN) / 4 and found.optimizer == 8 * LEARNING / 4
    outside = LEARNING - 2 * LAYER + STEM
    assert found.gathered == 2 * (outside + 3 * LAYER)  # two layers, and a layer's gradients
    assert found.gradients <= 4 * LEARNING / 4
    # the first moments of the last micro-batch: no shard is there yet, and all of the bfloat16 sum
    assert peak(replace(FSDP2, accumulate=True)).gradients > 4 * LEARNING / 4


def test_offloading_leaves_weights_or_a_gathered_part_of_them():
    two = peak(replace(BF16, zero=2, offloaded=("optimizer",)))
    assert (two.weights, two.gradients, two.optimizer, two.gathered) == (2 * (LEARNING + FROZEN), 0, 0, 0)
    three = peak(replace(BF16, zero=3, offloaded=("optimizer", "weights")))
    assert (three.weights, three.gradients, three.optimizer) == (0, 0, 0)
    assert three.gathered == 2 * (LEARNING + FROZEN)


def test_memory_of_the_cpu():
    def cpu(states: States) -> float:
        return cpu_memory(CONFIG, DECODER, states)

    assert cpu(replace(BF16, zero=2)) == 0
    two = replace(BF16, zero=2, offloaded=("optimizer",))
    assert cpu(two) == (12 + 4 + 2) * LEARNING / 4  # master and moments, gradient, weights on their way back
    assert cpu(replace(two, accumulate=True)) == (12 + 4 + 2 + 2) * LEARNING / 4
    three = replace(BF16, zero=3, offloaded=("optimizer", "weights"))
    assert cpu(three) == ((12 + 4 + 2) * LEARNING + 2 * (LEARNING + FROZEN)) / 4
    adapted = cpu_memory(CONFIG, DECODER, two, adapters=500)
    assert adapted == 18 * (500 + 5 * 8 + 9 * 8) / 4  # the adapters and the projector


@pytest.mark.parametrize("states", [DDP, replace(BF16, zero=2), replace(BF16, zero=3), FSDP2])
def test_more_gpus_never_need_more_of_each(states):
    totals = [peak(replace(states, gpus=gpus)).total for gpus in (2, 4, 8, 64)]
    assert totals == sorted(totals, reverse=True)


def test_labels():
    assert States().label == "nothing sharded"
    assert FSDP2.label == "FSDP2 on 4 GPUs"
    assert States(3, 8, offloaded=("optimizer",)).label == "ZeRO-3 with offload on 8 GPUs"


def test_an_unknown_place():
    with pytest.raises(ValueError, match=says("optimizer", "weights", "['tower']")):
        States(offloaded=("tower",))
