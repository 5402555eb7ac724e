"""Pooled pictures (``pyramid_drop.downsample``): training against a slow reference, and `attach` against training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_pdrop.generate.cache import cached_tokens
from llava_pdrop.generate.plugin import attach
from llava_pdrop.geometry import NEWLINE
from llava_pdrop.model import attention
from llava_pdrop.model.stream import StreamPlan
from llava_pdrop.model.vision import pack_by_geometry, tower_hidden, used_tower_layers
from llava_pdrop.model.vlm import PyramidLlava
from llava_pdrop.schedule import Schedule
from llava_pdrop.types import PackedBatch, Sample
from tests.families import FAMILIES
from tests.messages import says
from tests.parity.generation import (
    NEW,
    TWO,
    answers,
    generate,
    inputs,
    make_hf_model,
    recompute,
    rows_of_all_kinds,
    same,
)
from tests.reference import slow_reference
from tests.slow_pooling import slow_pooled, slow_tokens
from tests.tiny import ANYRES, LAYERS, PAD, PYRAMID, make_sample, make_tiny_hf, mixed_samples

GEOMETRIES = {"pad": PAD, "flat": replace(ANYRES, merge="flat"), "anyres": ANYRES}
SIDES = {1: 1, 5: 2, 9: 3}
"""Budgets of a tile of 4x4 patches, and the grids they come to."""

SCHEDULES = {
    "alone": Schedule(),
    "pyramid": PYRAMID,
    "counts": Schedule((2, 4), keep=(3, 1)),
    "before the decoder": Schedule((0, 3), (0.5, 0.2)),
    "injected": Schedule((2, 4), (0.5, 0.2), inject=2, positions="renumber"),
}


@torch.no_grad()
def shrunk(model: PyramidLlava, sample: Sample, side: int) -> tuple[torch.Tensor, Sample]:
    """What enters the decoder, (N, D), and the sample with no more placeholders than that: token by token."""
    hf, ids = model.hf, sample.input_ids
    x, stays, spans = model.hf.get_input_embeddings()(ids.clamp(max=98)), [True] * len(ids), []
    for image, (start, stop) in zip(sample.images, sample.image_spans):
        hidden = tower_hidden(hf.model.vision_tower, image.pixels, used_tower_layers(hf.config))[:, 1:]
        table = hf.model.multi_modal_projector(slow_pooled(hidden, side)).flatten(0, 1)
        stays[start:stop] = [False] * (stop - start)
        for token, cell in slow_tokens(model.geometry, image.size, side):
            x[start + token] = hf.model.image_newline if cell == NEWLINE else table[cell]
            stays[start + token] = True
        spans.append((sum(stays[:start]), sum(stays[:stop])))
    left = torch.tensor(stays)
    return x[left], replace(sample, input_ids=ids[left], labels=sample.labels[left], image_spans=tuple(spans))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("budget", SIDES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_training_equals_a_slow_reference_and_packed_equals_one_by_one(geometry, budget, schedule):
    geometry, schedule = GEOMETRIES[geometry], SCHEDULES[schedule]
    hf, samples = make_tiny_hf("llama_gqa", geometry), mixed_samples(geometry)
    model = PyramidLlava(hf, replace(schedule, downsample=budget), geometry)
    batch = PackedBatch.pack(samples)
    plan = StreamPlan.build(batch, model.schedule, geometry, model.device)
    together = model.logits(batch).split(plan.stages[-1].layout.seq_lens)
    for sample, packed in zip(samples, together):
        alone = model.logits(PackedBatch.pack([sample]))
        torch.testing.assert_close(packed, alone, atol=2e-5, rtol=2e-5)
        plain = PyramidLlava(hf, schedule, geometry)
        x, smaller = shrunk(plain, sample, SIDES[budget])
        plain.embed = lambda batch, plan, x=x: x
        torch.testing.assert_close(alone, slow_reference(plain, smaller)[0], atol=2e-5, rtol=2e-5)


def test_a_budget_that_no_tile_exceeds_changes_nothing():
    batch = PackedBatch.pack(mixed_samples(ANYRES))
    vanilla, whole = (
        PyramidLlava(make_tiny_hf(geometry=ANYRES), Schedule(downsample=budget)).logits(batch) for budget in (0, 99)
    )
    assert torch.equal(vanilla, whole)


def test_a_cut_picture_keeps_the_cells_that_its_placeholders_show():
    whole = make_sample(2, (28, 28), "1")
    cut = Sample("cut", whole.input_ids[:9], torch.full((9,), -100), whole.images, ((3, 9),))
    plan = StreamPlan.build(PackedBatch.pack([cut, whole]), Schedule(downsample=4), PAD, torch.device("cpu"))
    assert plan.feature_row.tolist() == [0, 1, 4, 5, 6, 7]
    assert plan.image_row.tolist() == [3, 4, 8, 9, 10, 11]
    assert plan.stages[0].layout.seq_lens == [5, 8]


def test_loss_and_gradients_reach_the_tower():
    model = PyramidLlava(make_tiny_hf(geometry=ANYRES), replace(PYRAMID, downsample=9))
    output = model(PackedBatch.pack(mixed_samples(ANYRES)))
    output.loss.backward()
    patches = model.hf.model.vision_tower.embeddings.patch_embedding.weight
    assert output.loss > 0 and patches.grad is not None and patches.grad.abs().sum() > 0


@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("budget", SIDES)
def test_attached_decoding_equals_recompute(budget, schedule, positions):
    hf, row = make_hf_model(), make_sample(*TWO)
    schedule = replace(SCHEDULES[schedule], downsample=budget, positions=positions)
    output = generate(attach(hf, schedule), row)
    same(torch.cat(output.logits), recompute(hf, row, answers(output)[0], schedule))
    text, tokens = len(row.input_ids) - 32, schedule.tokens_per_layer(SIDES[budget] ** 2, LAYERS)
    assert cached_tokens(output.past_key_values) == [text + 2 * count + NEW - 1 for count in tokens]


@pytest.mark.parametrize("merge", ["spatial_unpad", "spatial", "flat"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_attached_anyres_equals_recompute(schedule, merge):
    geometry = replace(ANYRES, merge=merge)
    hf, row = make_hf_model("qwen2", geometry), make_sample(1, (30, 30), (28, 80), 1, (64, 20), 2, geometry=geometry)
    pack_by_geometry(hf, geometry)
    schedule = replace(SCHEDULES[schedule], downsample=9)
    output = generate(attach(hf, schedule), row)
    same(torch.cat(output.logits), recompute(hf, row, answers(output)[0], schedule, geometry))


def test_attached_without_our_layout_of_tiles_is_as_transformers_rounds():
    size, hf, geometry = (47, 188), make_hf_model(geometry=ANYRES), replace(ANYRES, rounding="hf")
    assert ANYRES.num_tokens(size) != geometry.num_tokens(size)
    row, schedule = make_sample(1, size, 3, geometry=geometry), Schedule((2,), (0.5,), downsample=4)
    output = generate(attach(hf, schedule), row)
    same(torch.cat(output.logits), recompute(hf, row, answers(output)[0], schedule, geometry))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_padded_batch_equals_singles(schedule, geometry, implementation):
    hf, rows = make_hf_model("mistral_window", geometry, implementation), rows_of_all_kinds(geometry)
    attach(hf, replace(SCHEDULES[schedule], downsample=5))
    batch = generate(hf, *rows)
    for index, row in enumerate(rows):
        single = generate(hf, row)
        assert answers(single)[0] == answers(batch)[index]
        same(torch.stack(batch.logits)[:, index], torch.cat(single.logits))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_ways_to_generate(schedule, options):
    hf, row, schedule = make_hf_model(), make_sample(*TWO), replace(SCHEDULES[schedule], downsample=9)
    attach(hf, schedule)
    output = generate(hf, row, **options)
    answer = answers(output)[0]
    if "num_beams" not in options:
        assert answer == answers(generate(hf, row))[0]
        return
    expected = recompute(hf, row, answer, schedule.at("renumber")).log_softmax(-1)
    score = sum(float(expected[place, token]) for place, token in enumerate(answer))
    assert float(output.sequences_scores[0]) * len(answer) == pytest.approx(score, abs=1e-3)


def test_what_enters_and_what_survives_is_told():
    hf, trace = make_hf_model(), []
    generate(attach(hf, Schedule((2,), (0.5,), "uniform", downsample=4), trace), make_sample(1, (28, 28), 3))
    step = trace[0]
    assert step.pictures == [list(range(2, 18))]
    assert [place - 2 for place in step.entered if 2 <= place < 18] == [0, 2, 8, 10]
    assert step.kept(0) == [[2, 10]], "of the picture's own tokens"
    assert trace[1].entered is None and trace[1].survivors == []


def test_it_can_be_taken_off_again_and_a_picture_outside_of_a_prompt_is_left_alone():
    hf, row = make_hf_model(), make_sample(1, (28, 28), 3)
    before, features = generate(hf, row), hf.model.get_image_features(row.images[0].pixels).pooler_output
    attach(hf, Schedule(downsample=4))
    assert torch.equal(hf.model.get_image_features(row.images[0].pixels).pooler_output[0], features[0])
    assert not torch.equal(torch.stack(generate(hf, row).logits), torch.stack(before.logits))
    attach(hf, Schedule())
    assert torch.equal(torch.stack(generate(hf, row).logits), torch.stack(before.logits))


def test_what_cannot_be_pooled_is_one_line():
    hf, row, schedule = make_hf_model(), make_sample(1, (28, 28), 3), Schedule(downsample=4)
    encoded = hf.model.get_image_features(row.images[0].pixels)
    with pytest.raises(ValueError, match=says("pyramid_drop.downsample", "LlavaForConditionalGeneration")):
        attach(hf, schedule, unchecked=True)
    attach(hf, schedule)
    given = inputs(hf, row)
    del given["pixel_values"]
    with pytest.raises(ValueError, match=says("pyramid_drop.downsample", "encoded", "pixel_values")):
        hf(**given, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"llava", "llava_next"}))
def test_a_class_whose_tiles_are_not_known_is_refused(kind):
    family = FAMILIES[kind]
    model = family.build(family.decoders[0])
    why = ["vision_feature_layer", "'full'"] if kind == "pixtral" else ["llava and llava_next", type(model).__name__]
    with pytest.raises(ValueError, match=says("pyramid_drop.downsample", *why, "leave it out")):
        attach(model, Schedule(downsample=4))
    assert not hasattr(model, "_pyramid_drop")
