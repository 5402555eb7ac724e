"""The FLOP count against a count by hand, and against what torch counts while a step runs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from llava_pdrop.checkpoint.hf_models import make_hf_model
from llava_pdrop.cost.flops import (
    ALL_LAYERS,
    CountedStep,
    Recomputed,
    causal_pairs,
    predicted_reduction,
    stage_flops,
    step_flops,
)
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.model.stream import layouts_of
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.optim import freeze
from llava_pdrop.types import ImageInput, PackedBatch, Sample

DROP = Schedule(layers=(1, 2), ratios=(0.5, 0.25))
GEOMETRY = ImageGeometry(48, 12)
EVERYTHING = ("language_model", "projector", "vision_tower")


def sample(text: int, images: int = 1) -> Sample:
    ids, spans = [1], []
    for _ in range(images):
        spans.append((len(ids), len(ids) + 16))
        ids += [99] * 16
    ids += [5] * text
    labels = torch.full((len(ids),), -100)
    labels[-2:] = 5
    image = ImageInput(torch.rand(1, 3, 48, 48), (48, 48))
    return Sample("s", torch.tensor(ids), labels, (image,) * images, tuple(spans))


def batch() -> PackedBatch:
    return PackedBatch.pack([sample(6), sample(9, images=2), sample(4, images=0)])


def model(schedule: Schedule, recompute_layers: int | None = None) -> PyramidLlava:
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=48, patch_size=12
    )
    return PyramidLlava(make_hf_model(text, vision, GEOMETRY, 99), schedule, recompute_layers=recompute_layers)


def test_by_hand():
    """One sample of 1 + 16 + 6 tokens, two decoder layers of width 4 that drop to 4 image tokens in between."""
    text = SimpleNamespace(
        hidden_size=4, num_attention_heads=2, num_key_value_heads=1, head_dim=2, intermediate_size=6,
        num_hidden_layers=2, vocab_size=10, sliding_window=None,
    )  # fmt: skip
    vision = SimpleNamespace(hidden_size=8, intermediate_size=16, num_hidden_layers=2, image_size=48, patch_size=12)
    config = SimpleNamespace(text_config=text, vision_config=vision, vision_feature_layer=-2)
    batch = PackedBatch.pack([sample(6)])
    forward = step_flops(CountedStep(config, batch, Schedule((1,), (0.25,)), GEOMETRY, trainable=()))
    # q 4x4, k 4x2, v 4x2, o 4x4, three MLP maps 4x6: 48 + 72 = 120 multiply-accumulates per token and layer
    assert forward.decoder == 2 * 120 * (23 + 11)
    assert forward.attention == 2 * 2 * 4 * (23 * 24 // 2 + 11 * 12 // 2)
    assert forward.ranking == 2 * (23 * 4 * 2 + 1 * 4 * 4 + 23 * 4)
    assert forward.head == 2 * 2 * 4 * 10
    assert forward.projector == 2 * 16 * (8 * 4 + 4 * 4)
    assert forward.tower == 2 * (16 * 3 * 144 * 8 + 17 * (4 * 64 + 2 * 128) + 2 * 17 * 17 * 8)  # one of two layers
    trained = step_flops(CountedStep(config, batch, Schedule((1,), (0.25,)), GEOMETRY, ("projector", "language_model")))
    assert (trained.decoder, trained.head) == (3 * forward.decoder, 3 * forward.head)
    assert (trained.tower, trained.ranking) == (forward.tower, forward.ranking)
    assert trained.projector == 2 * 16 * (2 * 8 * 4 + 3 * 4 * 4)  # nothing below wants a gradient
    again = step_flops(
        CountedStep(config, batch, Schedule((1,), (0.25,)), GEOMETRY, ("projector", "language_model"), ALL_LAYERS)
    )
    assert again.decoder == 4 * forward.decoder - 2 * 4 * 6 * (23 + 11)  # without the last map of every layer


def test_sliding_window_pairs():
    assert causal_pairs(5) == 15
    assert causal_pairs(5, window=2) == 1 + 4 * 2
    assert causal_pairs(3, window=8) == 6


CASES = [
    (Schedule(), EVERYTHING, False, None),
    *((Schedule((1, 2), (0.5, 0.25), ranker=name), EVERYTHING[:2], False, None) for name in RANKERS),
    (Schedule((0, 2), keep=(9, 0), ranker=("divprune", "fastv")), EVERYTHING[:2], False, None),
    (Schedule((1, 2), (0.5, 0.25), inject=1), EVERYTHING[:2], True, 2),
    (Schedule((2, 3), (0.5, 0.25), inject=1), EVERYTHING, False, None),
    (Schedule(downsample=9), EVERYTHING, True, 2),
    (Schedule((1, 2), (0.5, 0.25), "all_text", downsample=4), EVERYTHING[:2], False, None),
    *(
        (Schedule((1, 2), (0.5, 0.25), merge="nearest"), parts, True, None)
        for parts in (EVERYTHING[:2], EVERYTHING[:1])
    ),
    *((DROP, EVERYTHING, True, first) for first in (0, 2)),
    (DROP, EVERYTHING[:2], True, 3),
    *((DROP, part, on, None) for part in (EVERYTHING, EVERYTHING[:2], *zip(EVERYTHING)) for on in (False, True)),
]


@pytest.mark.parametrize(("schedule", "trainable", "checkpointing", "recompute_layers"), CASES)
def test_equals_what_torch_counts(schedule, trainable, checkpointing, recompute_layers):
    equals_what_torch_counts(schedule, trainable, checkpointing, recompute_layers)


@pytest.mark.parametrize("recompute_layers", [None, 2])
def test_equals_what_torch_counts_where_the_tower_is_not_recomputed(recompute_layers):
    equals_what_torch_counts(DROP, EVERYTHING, True, recompute_layers, recompute_tower=False)


def equals_what_torch_counts(schedule, trainable, checkpointing, recompute_layers, recompute_tower=True) -> None:
    net = model(schedule, recompute_layers).train()
    net.recompute_tower = recompute_tower
    freeze(net, trainable)
    if checkpointing:
        net.activation_checkpointing_enable()
    packed = batch()
    counter = FlopCounterMode(display=False)
    with counter:
        net(packed).loss.backward()
    modules = counter.get_flop_counts()
    counted = modules["Global"]
    recomputed = Recomputed(recompute_layers, recompute_tower) if checkpointing else Recomputed()
    ours = step_flops(CountedStep(net.hf.config, packed, schedule, GEOMETRY, trainable, recomputed))
    # torch has no rule for the attention kernels of CPUs; all else is a product it knows
    products = sum(count for operation, count in counted.items() if "attention" not in str(operation))
    # older transformers make the angles of the rotary embedding, positions times frequencies, by a matrix product
    products -= sum(sum(counts.values()) for name, counts in modules.items() if name.endswith("rotary_emb"))
    tower_attention = _tower_attention(
        net.hf.config, packed, "vision_tower" in trainable, checkpointing and recompute_tower
    )
    assert products == ours.total - ours.attention - tower_attention


def _tower_attention(config, packed: PackedBatch, trainable: bool, checkpointing: bool) -> float:
    vision = config.vision_config
    forward = 4 * len(packed.pixels) * 17 * 17 * vision.hidden_size
    return forward * (vision.num_hidden_layers - 1) * (1 + trainable * (2.5 + checkpointing))


def test_attention_is_the_causal_half_of_what_torch_would_count():
    """torch counts n x n products for a sample of n tokens; a causal kernel runs n (n + 1) / 2 of them."""
    net = model(DROP)
    packed = batch()
    ours = step_flops(CountedStep(net.hf.config, packed, DROP, GEOMETRY, trainable=()))
    stages = layouts_of(packed, DROP, GEOMETRY)
    lengths = [stages[0].seq_lens, stages[1].seq_lens, stages[2].seq_lens, stages[2].seq_lens]
    full = sum(4 * n * n * 32 for layer in lengths for n in layer)
    diagonal = sum(4 * n * 32 for layer in lengths for n in layer)
    assert ours.attention == (full + diagonal) / 2


def test_recomputing_only_long_streams_gains_more_by_dropping():
    """Recomputation of a vanilla step is spread over all layers; a short late stream is no longer run again."""
    options = model(DROP).hf.config, batch(), DROP, GEOMETRY, EVERYTHING
    totals = [step_flops(CountedStep(*options, Recomputed(first, True))).total for first in (0, 1, 2, 4)]
    assert totals == sorted(totals) and totals[-1] == step_flops(CountedStep(*options, ALL_LAYERS)).total
    steps = [after - before for before, after in zip(totals, totals[1:])]
    assert steps[0] > steps[1] > steps[2] / 2 > 0  # layers 0 and 1 one by one, then 2 and 3 together
    off, none = (predicted_reduction([CountedStep(*options, *how)]) for how in ((), (Recomputed(0),)))
    assert off == none  # nothing runs again


def test_reduction_is_none_without_drops_and_grows_with_them():
    config = model(Schedule()).hf.config
    options = dict(geometry=GEOMETRY, trainable=("projector", "language_model"))
    assert predicted_reduction([CountedStep(config, batch(), Schedule(), **options)]) == 0
    some, more = (
        predicted_reduction([CountedStep(config, batch(), Schedule((1,), (ratio,)), **options)]) for ratio in (0.5, 0.0)
    )
    assert 0 < some < more < 1


@pytest.mark.parametrize("schedule", [Schedule(), DROP])
def test_stages_add_up_to_the_forward_of_the_layers(schedule):
    """With nothing to learn `step_flops` counts a forward: its decoder and attention, split at the drops."""
    config = model(schedule).hf.config
    whole = step_flops(CountedStep(config, batch(), schedule, GEOMETRY, trainable=()))
    stages = stage_flops(CountedStep(config, batch(), schedule, GEOMETRY))
    assert len(stages) == len(schedule.layers) + 1
    assert sum(stages) == whole.decoder + whole.attention
