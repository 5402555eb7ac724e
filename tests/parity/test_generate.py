"""The plug-in for Hugging Face's ``generate`` against the packed model, against vanilla, and against itself.

All models are tiny and random. The reference for cached decoding is `PyramidLlava.logits` over prompt and answer at once,
with the ranking token pinned to the end of the prompt: two implementations that share only the algorithm file.
"""

import copy

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llava_pdrop.model import attention
from llava_pdrop.model.cache import cached_tokens
from llava_pdrop.model.plugin import attach, detach
from llava_pdrop.model.schedule import Schedule
from llava_pdrop.model.vlm import PyramidLlava, geometry_of
from llava_pdrop.types import IGNORE_INDEX, ImageInput, PackedBatch, Sample

IMAGE, LAYERS, NEW = 99, 6, 6
PYRAMID = Schedule(layers=(2, 3, 5), ratios=(0.5, 0.25, 0.125))
TOLERANCE = 1e-4
DECODERS = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama_mqa": (LlamaConfig, {"num_key_value_heads": 1}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral_window": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 9}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 4}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8}),
}


def build(decoder="llama", anyres=False, implementation="sdpa"):
    kind, options = DECODERS[decoder]
    text = kind(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    common = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE, "image_token_index": IMAGE}
    if anyres:
        pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84]]
        config = LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)
    else:
        config = LlavaConfig(**common)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = (LlavaNextForConditionalGeneration if anyres else LlavaForConditionalGeneration)(config).eval()
    with torch.no_grad():  # wide weights, so that attention is far from uniform and greedy choices are clear
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def prompt(model, *pieces, seed=0):
    """A row: integers are text tokens, a (width, height) pair is an image of that size."""
    geometry, generator = geometry_of(model.config), torch.Generator().manual_seed(seed)
    ids, images, spans = [], [], []
    for piece in pieces:
        if isinstance(piece, int):
            ids.append(piece)
            continue
        tiles = geometry.num_tiles(piece)
        images.append(ImageInput(torch.randn(tiles, 3, 28, 28, generator=generator), piece))
        spans.append((len(ids), len(ids) + geometry.num_tokens(piece)))
        ids += [IMAGE] * geometry.num_tokens(piece)
    labels = torch.full((len(ids),), IGNORE_INDEX)
    return Sample("row", torch.tensor(ids), labels, tuple(images), tuple(spans))


def inputs(model, *rows):
    """Rows -> keyword arguments of the model, padded on the left."""
    longest = max(len(row.input_ids) for row in rows)
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, longest - len(row.input_ids) :] = row.input_ids
        mask[index, longest - len(row.input_ids) :] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    images = [image for row in rows for image in row.images]
    if not images:
        return batch
    if model.config.model_type == "llava":
        return {**batch, "pixel_values": torch.cat([image.pixels for image in images])}
    tiles = max(len(image.pixels) for image in images)
    pixels = [torch.cat([i.pixels, torch.zeros(tiles - len(i.pixels), 3, 28, 28)]) for i in images]
    sizes = torch.tensor([[height, width] for width, height in (image.size for image in images)])
    return {**batch, "pixel_values": torch.stack(pixels), "image_sizes": sizes}


def generate(model, *rows, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    with torch.no_grad():
        return model.generate(
            **inputs(model, *rows), **options, return_dict_in_generate=True, output_logits=True, output_scores=True
        )


def answers(output, new=NEW):
    return output.sequences[:, -new:].tolist()


def recompute(model, row, answer, schedule):
    """Logits (answer tokens, vocabulary) of the packed model over prompt and answer at once."""
    answer = torch.tensor(answer)
    sample = Sample(
        row.id,
        torch.cat([row.input_ids, answer]),
        torch.cat([row.labels, answer]),
        row.images,
        row.image_spans,
    )
    pyramid = PyramidLlava(copy.deepcopy(detach(model)), schedule)
    return pyramid.logits(PackedBatch.pack([sample]))[-len(answer) - 1 : -1]


def all_hooks(model):
    """Hooks of every module (transformers has some of its own)."""
    kinds = [name for name in vars(model) if name.endswith("_hooks") or "_hooks_" in name]
    return [dict(getattr(module, kind)) for module in model.modules() for kind in kinds]


def same(got, expected, tolerance=TOLERANCE):
    difference = (got - expected).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.2e}"


ONE = (1, 5, (28, 28), 7, 8, 9)
TWO = (1, (28, 28), (28, 28), 11, 12)  # two images without text between them
NONE = (1, 21, 22, 23)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule(layers=(1, 3), ratios=(1.0, 1.0))])
def test_schedule_that_drops_nothing_is_vanilla(schedule):
    model = build()
    rows = [prompt(model, *ONE), prompt(model, *TWO, seed=1), prompt(model, *NONE)]
    vanilla = generate(model, *rows)
    ours = generate(attach(model, schedule), *rows)
    assert answers(ours) == answers(vanilla)
    same(torch.stack(ours.logits), torch.stack(vanilla.logits))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("pieces", [ONE, TWO], ids=["one", "two"])
def test_decoding_with_caches_equals_recompute(decoder, pieces):
    model = build(decoder)
    row = prompt(model, *pieces)
    output = generate(attach(model, PYRAMID), row)
    logits = recompute(model, row, answers(output)[0], PYRAMID)
    same(torch.cat(output.logits), logits)
    assert logits.argmax(-1).tolist() == answers(output)[0]


@pytest.mark.parametrize("positions", ["renumber", "keep"])
@pytest.mark.parametrize("ranker", ["last_instruction", "fastv", "uniform"])
@pytest.mark.parametrize("layers", [(2, 3, 5), (1, 2, 4)])
def test_rankers_and_positions_equal_recompute(positions, ranker, layers):
    model = build()
    schedule = Schedule(layers, (0.6, 0.3, 0.0), ranker, positions)
    row = prompt(model, *TWO)
    output = generate(attach(model, schedule), row)
    same(torch.cat(output.logits), recompute(model, row, answers(output)[0], schedule))


@pytest.mark.parametrize("ranker", ["last_instruction", "fastv", "random", "uniform"])
def test_every_image_keeps_its_own_share(ranker):
    model, trace = build(anyres=True), []
    schedule = Schedule(PYRAMID.layers, PYRAMID.ratios, ranker)
    rows = [prompt(model, 1, (30, 30), (80, 20), 7), prompt(model, *NONE), prompt(model, 1, 5, (28, 80), 9, 10)]
    output = generate(attach(model, schedule, trace), *rows)
    totals = [stop - start for row in rows for start, stop in row.image_spans]
    assert len(set(totals)) == 3
    for drop in range(3):
        kept = trace[0].kept(drop)
        assert [len(image) for image in kept] == [schedule.kept(total, drop) for total in totals]
        assert all(image == sorted(set(image)) for image in kept)
    stages = [[schedule.tokens_per_layer(total, LAYERS) for total in totals[2 * i : 2 * i + 2]] for i in range(2)]
    longest = [max(a + b + 2, 4, c + 4) for (a, b), c in zip(zip(*stages[0]), *stages[1])]
    assert cached_tokens(output.past_key_values) == [length + NEW - 1 for length in longest]


def test_lengths_and_positions_of_every_layer():
    model, trace = build(), []
    row = prompt(model, *ONE)
    output = generate(attach(model, PYRAMID, trace), row)
    lengths = [5 + tokens for tokens in PYRAMID.tokens_per_layer(16, LAYERS)]
    assert cached_tokens(output.past_key_values) == [length + NEW - 1 for length in lengths]
    assert [p.tolist() for p in trace[0].position_ids] == [[list(range(length))] for length in lengths]
    for number, step in enumerate(trace[1:]):
        assert [p.tolist() for p in step.position_ids] == [[[length + number]] for length in lengths]
        assert step.survivors == []


@pytest.mark.parametrize("anyres", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.NAME])
@pytest.mark.parametrize("decoder", ["llama", "mistral_window"])
def test_padded_batch_equals_singles(anyres, implementation, decoder):
    attention.register()
    model = build(decoder, anyres, implementation)
    size = (50, 30) if anyres else (28, 28)
    rows = [
        prompt(model, 1, 5, size, 7, 8, 9),
        prompt(model, 1, (30, 30), (28, 80), 11, 12, seed=1) if anyres else prompt(model, *TWO, seed=1),
        prompt(model, *NONE),
        prompt(model, size, 3, seed=2),
    ]
    attach(model, PYRAMID)
    batch = generate(model, *rows)
    for index, row in enumerate(rows):
        single = generate(model, row)
        assert answers(single)[0] == answers(batch)[index]
        same(torch.stack(batch.logits)[:, index], torch.cat(single.logits))
    if implementation != "sdpa":
        model.set_attn_implementation("sdpa")
        same(torch.stack(generate(model, *rows).logits), torch.stack(batch.logits))


def test_anyres_equals_recompute():
    model = build("qwen2", anyres=True)
    row = prompt(model, 1, (30, 30), (28, 80), 11, (64, 20), 12, 13)
    output = generate(attach(model, PYRAMID), row)
    same(torch.cat(output.logits), recompute(model, row, answers(output)[0], PYRAMID))


def test_plain_forward_finds_the_same_images():
    """Without ``generate`` the lengths of the images come from their sizes, and the last real token ranks."""
    for anyres, sizes in ((False, [(28, 28)] * 2), (True, [(30, 30), (28, 80)])):
        model, trace = build(anyres=anyres), []
        attach(model, PYRAMID, trace)
        rows = [prompt(model, 1, *sizes, 7, 8), prompt(model, *NONE)]
        generated = generate(model, *rows, max_new_tokens=1)
        with torch.no_grad():
            output = model(**inputs(model, *rows))
        assert trace[0].survivors == trace[1].survivors and trace[0].image_spans == trace[1].image_spans
        same(output.logits[:, -1], generated.logits[0])
        assert cached_tokens(output.past_key_values) == cached_tokens(generated.past_key_values)


def test_beams_have_the_scores_of_recompute():
    model = build()
    rows = [prompt(model, *ONE), prompt(model, *TWO, seed=1), prompt(model, *NONE)]
    attach(model, PYRAMID)
    output = generate(model, *rows, num_beams=3, num_return_sequences=3, length_penalty=0.0)
    scores = output.sequences_scores
    for index, answer in enumerate(answers(output)):
        logits = recompute(model, rows[index // 3], answer, PYRAMID)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
        same(scores[index], expected)


def test_samples_have_the_logits_of_recompute():
    model = build()
    row = prompt(model, *TWO)
    output = generate(attach(model, PYRAMID), row, do_sample=True, num_return_sequences=3, top_k=0)
    assert len({tuple(answer) for answer in answers(output)}) > 1
    for index, answer in enumerate(answers(output)):
        same(torch.stack(output.logits)[:, index], recompute(model, row, answer, PYRAMID))


def test_prompt_lookup_equals_greedy():
    """The first forward holds guessed tokens behind the prompt, and wrong guesses are cropped off the pruned cache."""
    model, trace = build(), []
    row = prompt(model, 7, 8, 40, 41, 42, (28, 28), 9, 7, 8)
    greedy = generate(attach(model, PYRAMID, trace), row, max_new_tokens=12)
    trace.clear()
    lookup = generate(model, row, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert trace[0].position_ids[0].shape[1] > len(row.input_ids), "the prompt was meant to come with guesses"
    assert answers(lookup, 12) == answers(greedy, 12)
    same(torch.cat(lookup.logits), torch.cat(greedy.logits))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_other_caches_equal_the_default(options):
    model = build()
    rows = [prompt(model, *ONE), prompt(model, *TWO, seed=1), prompt(model, *NONE)]
    attach(model, PYRAMID)
    default, other = generate(model, *rows), generate(model, *rows, **options)
    assert answers(default) == answers(other)
    same(torch.stack(default.logits), torch.stack(other.logits))


def test_second_turn_on_the_pruned_cache():
    model = build()
    row = prompt(model, *ONE)
    first = generate(attach(model, PYRAMID), row)
    question = [31, 32, 33]
    ids = torch.cat([first.sequences, torch.tensor([question])], dim=1)
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    second = model.generate(input_ids=ids, past_key_values=first.past_key_values, pad_token_id=0, **options)
    turns = answers(first)[0] + question + answers(second)[0]
    same(torch.cat(second.logits), recompute(model, row, turns, PYRAMID)[-NEW:])


def test_image_of_a_second_turn_stays_whole():
    model = build()
    for pieces, pruned in ((ONE, PYRAMID.tokens_per_layer(16, LAYERS)), (NONE, [-1] * LAYERS)):
        row = prompt(model, *pieces)
        first = generate(attach(model, PYRAMID), row)
        more = prompt(model, 31, (28, 28), 32, seed=5)
        ids = torch.cat([first.sequences, more.input_ids[None]], dim=1)
        cache = first.past_key_values
        with torch.no_grad():
            model(input_ids=ids[:, cache.get_seq_length() :], pixel_values=more.images[0].pixels, past_key_values=cache)
        assert cached_tokens(cache) == [5 + tokens + NEW + 18 for tokens in pruned]


def test_cropping_into_the_images_is_refused():
    model = build()
    output = generate(attach(model, PYRAMID), prompt(model, *ONE))
    cache = output.past_key_values
    cache.crop(-(NEW - 1) - 3)
    assert cached_tokens(cache) == [2 + tokens for tokens in PYRAMID.tokens_per_layer(16, LAYERS)]
    with pytest.raises(ValueError, match="image tokens lie at different places"):
        cache.crop(-1)


def test_detach_restores_the_model():
    model = build()
    row, keys = prompt(model, *ONE), list(model.state_dict())
    before = generate(model, row)
    attributes, hooks = set(model.__dict__), all_hooks(model)
    attach(attach(model, PYRAMID), Schedule(layers=(4,), ratios=(0.1,)))
    assert cached_tokens(generate(model, row).past_key_values) == [26, 26, 26, 26, 11, 11]
    assert detach(model) is model and detach(model) is model
    assert set(model.__dict__) == attributes and list(model.state_dict()) == keys
    assert all_hooks(model) == hooks
    after = generate(model, row)
    assert answers(after) == answers(before) and type(after.past_key_values).__name__ == "DynamicCache"
    same(torch.cat(after.logits), torch.cat(before.logits), 0.0)


def test_schedule_of_the_config_and_copies():
    model = build()
    model.config.pyramid_drop = PYRAMID.to_dict()
    row = prompt(model, *ONE)
    expected = generate(attach(model), row)
    twin = copy.deepcopy(model)
    detach(model)
    assert answers(generate(twin, row)) == answers(expected)
    assert cached_tokens(generate(twin, row).past_key_values) == cached_tokens(expected.past_key_values)
    assert cached_tokens(generate(model, row).past_key_values) == [5 + 16 + NEW - 1] * LAYERS


def test_what_cannot_work_says_so():
    model = attach(build(), PYRAMID)
    row = inputs(model, prompt(model, *ONE))
    embeds = model.get_input_embeddings()(row["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeds, attention_mask=row["attention_mask"], max_new_tokens=1)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**row, max_new_tokens=1, prefill_chunk_size=8)
    with pytest.raises(ValueError, match="labels no longer line up"):
        model(**row, labels=row["input_ids"])
    with pytest.raises(ValueError, match="last possible entry is 5"):
        attach(model, Schedule(layers=(6,), ratios=(0.5,)))
    with pytest.raises(ValueError, match="unknown pyramid_drop.ranker"):
        attach(model, Schedule(layers=(2,), ratios=(0.5,), ranker="best"))
    with pytest.raises(ValueError, match="LLaMA-like decoder"):
        attach(model.model.vision_tower, PYRAMID)
