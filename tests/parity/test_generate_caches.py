"""The plug-in with everything that handles a cache (beams, samples, guesses, turns, cropping), and taking it off."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from llava_pdrop.generate.cache import cached_tokens
from llava_pdrop.generate.plugin import attach, detach
from llava_pdrop.schedule import Schedule
from tests.messages import says
from tests.parity.generation import (
    NEW,
    NONE,
    ONE,
    REPEATS_ROWS,
    SQUARE,
    TWO,
    answers,
    generate,
    inputs,
    make_hf_model,
    recompute,
    rows_of_all_kinds,
    run,
    same,
)  # fmt: skip
from tests.tiny import LAYERS, PYRAMID, make_sample


def test_beams_have_the_scores_of_recompute():
    hf = make_hf_model()
    rows = [make_sample(*pieces) for pieces in (ONE, TWO if REPEATS_ROWS else ONE[1:], NONE)]
    attach(hf, PYRAMID)
    output = generate(hf, *rows, num_beams=3, num_return_sequences=3, length_penalty=0.0)
    for index, answer in enumerate(answers(output)):
        logits = recompute(hf, rows[index // 3], answer, PYRAMID)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        same(output.sequences_scores[index], expected)


def test_samples_have_the_logits_of_recompute():
    hf, row = make_hf_model(), make_sample(*(TWO if REPEATS_ROWS else ONE))
    torch.manual_seed(0)
    output = generate(attach(hf, PYRAMID), row, do_sample=True, num_return_sequences=3, top_k=0)
    assert len({tuple(answer) for answer in answers(output)}) > 1
    for index, answer in enumerate(answers(output)):
        same(torch.stack(output.logits)[:, index], recompute(hf, row, answer, PYRAMID))


@pytest.mark.parametrize("decoder", ["llama_gqa", "mistral_window"])
def test_prompt_lookup_equals_greedy(decoder):
    """The first forward holds guessed tokens behind the prompt, and wrong guesses are cropped off the pruned cache."""
    hf, trace, row = make_hf_model(decoder), [], make_sample(5, SQUARE, 3)
    ids = row.input_ids.clone()
    ids[-2:] = ids[1:3]  # the prompt ends like it begins, so there is something to guess
    row = replace(row, input_ids=ids)
    greedy = generate(attach(hf, PYRAMID, trace), row, max_new_tokens=12)
    trace.clear()
    lookup = generate(hf, row, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert trace[0].position_ids[0].shape[1] > len(ids), "the prompt was meant to come with guesses"
    assert answers(lookup, 12) == answers(greedy, 12)
    same(torch.cat(lookup.logits), torch.cat(greedy.logits))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
@pytest.mark.parametrize("decoder", ["llama_gqa", "mistral_window"])
def test_other_caches_equal_the_default(options, decoder):
    hf, rows = make_hf_model(decoder), rows_of_all_kinds()
    attach(hf, PYRAMID)
    default, other = generate(hf, *rows), generate(hf, *rows, **options)
    assert answers(default) == answers(other)
    same(torch.stack(default.logits), torch.stack(other.logits))


def test_second_turn_on_the_pruned_cache():
    hf, row, question = make_hf_model(), make_sample(*ONE), [31, 32, 33]
    first = generate(attach(hf, PYRAMID), row)
    ids = torch.cat([first.sequences, torch.tensor([question])], dim=1)
    second = run(hf, input_ids=ids, past_key_values=first.past_key_values)
    turns = answers(first)[0] + question + answers(second)[0]
    same(torch.cat(second.logits), recompute(hf, row, turns, PYRAMID)[-NEW:])


def test_second_turn_of_a_padded_batch():
    hf, rows = make_hf_model(), rows_of_all_kinds()
    questions = [[31, 32, 33], [0, 0, 34], [0, 35, 36], [37, 38, 39]]  # 0 is padding
    attach(hf, PYRAMID)

    def second(rows, questions):
        first, batch, asked = generate(hf, *rows), inputs(hf, *rows), torch.tensor(questions)
        answered = torch.ones(len(rows), NEW, dtype=torch.long)
        mask = torch.cat([batch["attention_mask"], answered, asked != 0], dim=1)
        ids = torch.cat([first.sequences, asked], dim=1)
        return run(hf, input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values)

    batch = second(rows, questions)
    for index, (row, question) in enumerate(zip(rows, questions)):
        single = second([row], [[token for token in question if token]])
        assert answers(single)[0] == answers(batch)[index]
        same(torch.stack(batch.logits)[:, index], torch.cat(single.logits))


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([3, 1, 0, 2])), [3, 1, 0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows_of_the_cache_take_their_prompts_along(change, rows):
    hf = attach(make_hf_model(), PYRAMID)
    batch = inputs(hf, *rows_of_all_kinds())
    token, mask = torch.tensor([[31]]), torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)

    def decode(cache, rows):
        with torch.no_grad():
            return hf(
                input_ids=token.expand(len(rows), 1), attention_mask=mask[rows], past_key_values=cache,
                position_ids=mask[rows].sum(1, keepdim=True) - 1,
            ).logits  # fmt: skip

    with torch.no_grad():
        cache, changed = (
            hf(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0)).past_key_values
            for _ in range(2)
        )
    change(changed)
    same(decode(changed, rows), decode(cache, [0, 1, 2, 3])[rows])
    cache.reset()
    assert cache.stages is None


@pytest.mark.parametrize("pieces", [ONE, NONE], ids=["after image", "after text"])
def test_image_of_a_second_turn_stays_whole(pieces):
    hf = make_hf_model()
    cache = generate(attach(hf, PYRAMID), make_sample(*pieces)).past_key_values
    before, more = cached_tokens(cache), make_sample(1, SQUARE, 2)
    with torch.no_grad():
        hf(input_ids=more.input_ids[None], pixel_values=more.images[0].pixels, past_key_values=cache)
    assert cached_tokens(cache) == [tokens + len(more.input_ids) for tokens in before]


def test_cropping_stops_at_the_images():
    hf = make_hf_model()
    cache = generate(attach(hf, PYRAMID), make_sample(*ONE)).past_key_values
    cache.crop(-(NEW - 1) - 3)
    assert cached_tokens(cache) == [2 + tokens for tokens in PYRAMID.tokens_per_layer(16, LAYERS)]
    with pytest.raises(ValueError, match=says("crop", "image tokens")):
        cache.crop(-1)


def test_detach_restores_the_model():
    hf, row = make_hf_model(), make_sample(*ONE)
    before, keys = generate(hf, row), list(hf.state_dict())
    attributes, hooks, config = set(vars(hf)), all_hooks(hf), hf.config.to_dict()
    attach(attach(hf, PYRAMID), Schedule(layers=(4,), ratios=(0.1,)))
    assert cached_tokens(generate(hf, row).past_key_values) == [26, 26, 26, 26, 11, 11]
    assert detach(hf) is hf and detach(hf) is hf
    assert set(vars(hf)) == attributes and list(hf.state_dict()) == keys and hf.config.to_dict() == config
    assert all_hooks(hf) == hooks
    after = generate(hf, row)
    assert answers(after) == answers(before) and type(after.past_key_values) is type(before.past_key_values)
    same(torch.cat(after.logits), torch.cat(before.logits), 0.0)


def test_schedule_of_the_config_and_copies():
    hf, row = make_hf_model(), make_sample(*ONE)
    hf.config.pyramid_drop = PYRAMID.to_dict()
    expected = generate(attach(hf), row)
    twin = copy.deepcopy(hf)
    detach(hf)
    assert answers(generate(twin, row)) == answers(expected)
    assert cached_tokens(generate(twin, row).past_key_values) == cached_tokens(expected.past_key_values)
    assert cached_tokens(generate(hf, row).past_key_values) == [5 + 16 + NEW - 1] * LAYERS


def test_what_cannot_work_says_so():
    hf = attach(make_hf_model(), PYRAMID)
    row = inputs(hf, make_sample(*ONE))
    embeds = hf.get_input_embeddings()(row["input_ids"])
    with pytest.raises(ValueError, match=says("inputs_embeds", "input_ids")):
        hf.generate(inputs_embeds=embeds, attention_mask=row["attention_mask"], max_new_tokens=1)
    with pytest.raises(ValueError, match=says("prefill_chunk_size")):
        hf.generate(**row, max_new_tokens=1, prefill_chunk_size=8)
    with pytest.raises(ValueError, match=says("labels", "PyramidLlava")):
        hf(**row, labels=row["input_ids"])
    with pytest.raises(ValueError, match=says("2-D attention_mask")):
        hf(**row | {"attention_mask": torch.ones(1, 1, 21, 21).bool()})
    cache = run(hf, **row).past_key_values
    attach(hf, Schedule(layers=(1,), ratios=(0.5,)))
    with pytest.raises(ValueError, match=says("cache", "another schedule")):
        hf(input_ids=row["input_ids"][:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match=says("pyramid_drop.layers", "6", "5")):
        attach(hf, Schedule(layers=(6,), ratios=(0.5,)))
    with pytest.raises(ValueError, match=says("pyramid_drop.ranker", "'best'")):
        attach(hf, Schedule(layers=(2,), ratios=(0.5,), ranker="best"))
    with pytest.raises(ValueError, match=says("CLIPVisionModel")):
        attach(hf.model.vision_tower, PYRAMID)


def all_hooks(hf) -> list[dict]:
    """The hooks of every module (transformers has some of its own)."""
    kinds = [name for name in vars(hf) if "_hooks" in name]
    return [dict(getattr(module, kind)) for module in hf.modules() for kind in kinds]
