"""The plug-in for Hugging Face's ``generate`` against the packed model, against vanilla, and rows against batches.

The reference for decoding with caches is `PyramidLlava.logits` over prompt and answer at once: the two share the
algorithm file and nothing of how a batch, a mask or a cache is laid out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llava_pdrop.generate.cache import cached_tokens
from llava_pdrop.generate.plugin import attach
from llava_pdrop.model import attention
from llava_pdrop.model.rankers import RANKERS
from llava_pdrop.schedule import Schedule
from tests.parity.generation import (
    DECODERS,
    NEW,
    NONE,
    ONE,
    TWO,
    answers,
    generate,
    inputs,
    make_hf_model,
    recompute,
    rows_of_all_kinds,
    same,
)  # fmt: skip
from tests.tiny import ANYRES, LAYERS, PAD, PYRAMID, make_sample


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(layers=(1, 3), ratios=(1.0, 1.0))], ids=["empty", "ones"])
@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
def test_schedule_that_drops_nothing_is_vanilla(schedule, geometry):
    hf, rows = make_hf_model(geometry=geometry), rows_of_all_kinds(geometry)
    vanilla = generate(hf, *rows)
    ours = generate(attach(hf, schedule), *rows)
    assert answers(ours) == answers(vanilla)
    same(torch.stack(ours.logits), torch.stack(vanilla.logits))


def test_text_alone_is_vanilla():
    hf, rows = make_hf_model(), [make_sample(3), make_sample(9)]
    vanilla = generate(hf, *rows)
    ours = generate(attach(hf, PYRAMID), *rows)
    same(torch.stack(ours.logits), torch.stack(vanilla.logits), 0.0)
    assert type(ours.past_key_values) is type(vanilla.past_key_values)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("pieces", [ONE, TWO], ids=["one", "two"])
def test_decoding_with_caches_equals_recompute(decoder, pieces):
    hf, row = make_hf_model(decoder), make_sample(*pieces)
    output = generate(attach(hf, PYRAMID), row)
    logits = recompute(hf, row, answers(output)[0], PYRAMID)
    same(torch.cat(output.logits), logits)
    assert logits.argmax(-1).tolist() == answers(output)[0]


@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize("ranker", [name for name in RANKERS if name != "random"])
@pytest.mark.parametrize("layers", [(2, 3, 5), (1, 2, 4)], ids=str)
def test_rankers_and_positions_equal_recompute(positions, ranker, layers):
    hf, row = make_hf_model(), make_sample(*TWO)
    schedule = Schedule(layers, (0.6, 0.3, 0.0), ranker, positions)
    output = generate(attach(hf, schedule), row)
    same(torch.cat(output.logits), recompute(hf, row, answers(output)[0], schedule))


@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule((0, 3), (0.5, 0.2)),
        Schedule((0,), (0.0,)),
        Schedule((0, 2, 5), keep=(0.75, 5, 1), ranker=("divprune", "v2drop", "last_instruction")),
        Schedule((3, 5), (0.5, 0.2), inject=2),
        Schedule((1, 4), (0.5, 0.0), inject=1),
        Schedule((0, 3), (0.5, 0.2), merge="nearest"),
    ],
    ids=["two", "nothing", "three rankers", "injected", "injected and dropped", "merged"],
)
def test_what_happens_before_the_first_layer_equals_recompute(schedule, positions):
    hf, row, schedule = make_hf_model(), make_sample(*TWO), replace(schedule, positions=positions)
    output = generate(attach(hf, schedule), row)
    same(torch.cat(output.logits), recompute(hf, row, answers(output)[0], schedule))
    text, tokens = len(row.input_ids) - 32, schedule.tokens_per_layer(16, LAYERS)
    assert cached_tokens(output.past_key_values) == [text + 2 * count + NEW - 1 for count in tokens]


@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_anyres_equals_recompute(positions):
    hf, row = make_hf_model("qwen2", ANYRES), make_sample(1, (30, 30), (28, 80), 1, (64, 20), 2, geometry=ANYRES)
    schedule = replace(PYRAMID, positions=positions)
    output = generate(attach(hf, schedule), row)
    same(torch.cat(output.logits), recompute(hf, row, answers(output)[0], schedule, ANYRES))


EARLY = {
    "before the decoder": Schedule((0, 3), (0.5, 0.2)),
    "injected": Schedule((3, 5), (0.5, 0.2), inject=2),
    "injected and dropped": Schedule(
        (2, 5), keep=(7, 0), inject=2, ranker=("visual_attention", "fastv"), merge="nearest"
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
@pytest.mark.parametrize("decoder", ["llama_gqa", "mistral_window"])
@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize("schedule", EARLY)
def test_padded_batch_equals_singles_however_early(schedule, implementation, decoder, positions):
    hf, rows = make_hf_model(decoder, implementation=implementation), rows_of_all_kinds()
    attach(hf, replace(EARLY[schedule], positions=positions))
    batch = generate(hf, *rows)
    for index, row in enumerate(rows):
        single = generate(hf, row)
        assert answers(single)[0] == answers(batch)[index]
        same(torch.stack(batch.logits)[:, index], torch.cat(single.logits))


@pytest.mark.parametrize("schedule", EARLY)
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_ways_to_generate_however_early(schedule, options):
    """Beams repeat and choose rows of the cache; a static cache has room; without one every step is a prompt."""
    hf, row = make_hf_model(), make_sample(*TWO)
    attach(hf, EARLY[schedule])
    output = generate(hf, row, **options)
    answer = answers(output)[0]
    if "num_beams" not in options:
        assert answer == answers(generate(hf, row))[0]
    expected = recompute(hf, row, answer, EARLY[schedule].at("renumber")).log_softmax(-1)
    score = sum(float(expected[place, token]) for place, token in enumerate(answer))
    if "num_beams" in options:
        assert float(output.sequences_scores[0]) * len(answer) == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
@pytest.mark.parametrize("decoder", ["llama_gqa", "mistral_window"])
@pytest.mark.parametrize("positions", ["renumber", "keep"])
def test_padded_batch_equals_singles(geometry, implementation, decoder, positions):
    hf, rows = make_hf_model(decoder, geometry, implementation), rows_of_all_kinds(geometry)
    attach(hf, replace(PYRAMID, positions=positions))
    batch = generate(hf, *rows)
    for index, row in enumerate(rows):
        single = generate(hf, row)
        assert answers(single)[0] == answers(batch)[index]
        same(torch.stack(batch.logits)[:, index], torch.cat(single.logits))
    if implementation != "sdpa":
        hf.set_attn_implementation("sdpa")
        same(torch.stack(generate(hf, *rows).logits), torch.stack(batch.logits))


@pytest.mark.parametrize("ranker", RANKERS)
def test_every_image_keeps_its_own_share(ranker):
    hf, trace, schedule = make_hf_model(geometry=ANYRES), [], replace(PYRAMID, ranker=ranker)
    pieces = [((30, 30), (80, 20), 1), NONE, (1, (28, 80), 3)]
    rows = [make_sample(*row, geometry=ANYRES) for row in pieces]
    output = generate(attach(hf, schedule, trace), *rows)
    totals = [stop - start for row in rows for start, stop in row.image_spans]
    assert len(set(totals)) == 3
    for drop in range(len(schedule.layers)):
        kept = trace[0].kept(drop)
        assert [len(image) for image in kept] == [schedule.kept(total, drop) for total in totals]
        assert all(image == sorted(set(image)) for image in kept)
    first, second, third = (schedule.tokens_per_layer(total, LAYERS) for total in totals)
    longest = [max(a + b + 2, 4, c + 5) for a, b, c in zip(first, second, third)]
    assert cached_tokens(output.past_key_values) == [length + NEW - 1 for length in longest]


def test_lengths_and_positions_of_every_layer():
    hf, trace = make_hf_model(), []
    output = generate(attach(hf, PYRAMID, trace), make_sample(*ONE))
    lengths = [5 + tokens for tokens in PYRAMID.tokens_per_layer(16, LAYERS)]
    assert cached_tokens(output.past_key_values) == [length + NEW - 1 for length in lengths]
    assert [p.tolist() for p in trace[0].position_ids] == [[list(range(length))] for length in lengths]
    for number, step in enumerate(trace[1:]):
        assert [p.tolist() for p in step.position_ids] == [[[length + number]] for length in lengths]
        assert step.survivors == []


@pytest.mark.parametrize("geometry", [PAD, ANYRES], ids=["pad", "anyres"])
def test_plain_forward_drops_the_same(geometry):
    """Without ``generate`` the lengths of images come from their sizes, and the last real token of a row ranks, be the
    padding on the left or on the right."""
    hf, trace = make_hf_model(geometry=geometry), []
    attach(hf, PYRAMID, trace)
    rows = rows_of_all_kinds(geometry)
    generated = generate(hf, *rows, max_new_tokens=1)
    left = inputs(hf, *rows)
    right = {**left, "input_ids": torch.zeros_like(left["input_ids"])}
    right["attention_mask"] = left["attention_mask"].flip(1)
    right["input_ids"][right["attention_mask"].bool()] = left["input_ids"][left["attention_mask"].bool()]
    for batch in (left, right):
        with torch.no_grad():
            output = hf(**batch)
        assert trace[0].survivors == trace[-1].survivors and trace[0].pictures == trace[-1].pictures
        same(output.logits[:, -1], generated.logits[0])
        assert cached_tokens(output.past_key_values) == cached_tokens(generated.past_key_values)
