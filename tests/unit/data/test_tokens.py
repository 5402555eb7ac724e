"""Records -> ids and labels: equal to the official code where that is right, as a user expects where it is not."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.images import image_size
from llava_pdrop.data.labels import IMAGE_SLOT, expand_slots
from llava_pdrop.data.records import read_records
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import IGNORE_INDEX, ImageInput, PackedBatch, Record, Turn
from tests.messages import says

PAD = ImageGeometry(56, 14)
ANYRES = ImageGeometry(56, 14, "anyres", "spatial_unpad", ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168)))
IMAGE = ImageInput(torch.zeros(1, 3, 56, 56), (30, 20))
V1, PLAIN, QA = TEMPLATES["v1"], TEMPLATES["plain"], TEMPLATES["qa"]


def make_record(*texts: str) -> Record:
    """A record whose texts are a human's and the assistant's in turn."""
    turns = tuple(Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts))
    return Record(id="r1", turns=turns, images=(), origin="made.json[0]")


@pytest.fixture(scope="session")
def golden_tokenizer(golden):
    if find_spec("google") is None or find_spec("google.protobuf") is None:
        pytest.fail("reading tokenizer.model files needs the package protobuf")
    return cache(lambda name: AutoTokenizer.from_pretrained(golden / "tokenizers" / name.partition("@")[0]))


def read_json(path: Path):
    if not path.exists():
        pytest.skip(f"{path.name} is not in this reference directory")
    return json.loads(path.read_text(encoding="utf-8"))


def show(sample, tokenizer) -> tuple[str, str]:
    """The text of a sample with ``#`` for image tokens, and the trained part of it."""
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    for i, token in enumerate(ids):
        inside = any(start <= i < stop for start, stop in sample.image_spans)
        assert inside == (token == tokenizer.image_token_id)
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace(tokenizer.image_token, "#")
    targets = [token for token in labels if token != IGNORE_INDEX]
    return text, tokenizer.decode(targets, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["e2e_l15_train", "e2e_l15_train_maxlen", "e2e_next_train", "e2e_next_train_maxlen"])
def test_whole_samples_equal_the_official_ones(golden, golden_tokenizer, name):
    """From the data file to merged labels, cut at the maximum length included."""
    case = read_json(golden / "cases" / f"{name}.json")
    tensors = load_file(golden / "cases" / f"{name}.safetensors")
    folder = golden / "e2e" / name.removeprefix("e2e_").replace("_train", "")
    tokenizer = golden_tokenizer("sp_legacy_false")
    geometry = ANYRES if "next" in name else PAD
    limit = case["config_overrides"]["tokenizer_model_max_length"]
    image_token = len(tokenizer)

    for row, record in enumerate(read_records(folder / "data.json", folder / "images")):
        images = [ImageInput(torch.empty(0), image_size(path)) for path in record.images]
        sample = Encoder(V1, tokenizer, image_token, geometry, limit, "tokens").train(record, images)
        real = tensors["merged.attention_mask"][row].bool()
        assert torch.equal(sample.labels, tensors["merged.labels"][row][real])
        source = tensors["in.input_ids"][row][tensors["in.attention_mask"][row].bool()].tolist()
        text = [token for token in source if token != IMAGE_SLOT]
        ours = [token for token in sample.input_ids.tolist() if token != image_token]
        assert ours == text[: len(ours)]


@pytest.mark.parametrize(
    "name",
    ["l15_train_trunc_answer", "l15_train_trunc_no_answer_left", "l15_train_collator_cut_placeholder"],
)
def test_cuts_at_the_maximum_length_equal_the_official_ones(golden, name):
    case = read_json(golden / "cases" / f"{name}.json")
    tensors = load_file(golden / "cases" / f"{name}.safetensors")
    limit = case["config_overrides"].get("tokenizer_model_max_length", 2048)
    for row, real in enumerate(tensors["in.attention_mask"].bool()):
        ids, labels = tensors["in.input_ids"][row][real].tolist(), tensors["in.labels"][row][real].tolist()
        sizes = [(56, 56)] * ids.count(IMAGE_SLOT)
        ids, labels, spans = expand_slots(ids, labels, sizes, 10**6, PAD, limit)
        merged = tensors.get("merged.attention_mask")
        expected = tensors["merged.labels"][row]
        assert labels == (expected if merged is None else expected[merged[row].bool()]).tolist()
        assert sum(stop - start for start, stop in spans) == ids.count(10**6)


def test_qa_sample(tokenizer, image_token_id):
    sample = Encoder(QA, tokenizer, image_token_id, PAD).train(make_record("<image>\nWhich?", "7"), [IMAGE])
    assert show(sample, tokenizer) == ("<s>" + "#" * 16 + "\nWhich? 7\n", " 7\n")
    assert sample.image_spans == ((1, 17),) and sample.images == (IMAGE,) and sample.id == "r1"
    assert PackedBatch.pack([sample]).answer_starts == [[len(sample.input_ids) - 3]]


def test_several_images(tokenizer, image_token_id):
    record = make_record("<image> or <image>?", "a", "And <image>?", "b")
    images = [IMAGE, ImageInput(torch.zeros(3, 3, 56, 56), (120, 50)), ImageInput(torch.zeros(4, 3, 56, 56), (57, 131))]
    sample = Encoder(QA, tokenizer, image_token_id, ANYRES).train(record, images)
    counts = [ANYRES.num_tokens(image.size) for image in images]
    assert [stop - start for start, stop in sample.image_spans] == counts and len(set(counts)) == 3
    first, second, third = ("#" * count for count in counts)
    assert show(sample, tokenizer) == (f"<s>{first} or {second}? a\nAnd {third}? b\n", " a\n b\n")


def test_text_only(tokenizer, image_token_id):
    sample = Encoder(V1, tokenizer, image_token_id, PAD).train(make_record("Hi?", "Yo"), [])
    text, target = show(sample, tokenizer)
    assert text.endswith("USER: Hi? ASSISTANT: Yo</s>") and target == " Yo</s>" and sample.image_spans == ()


def test_prompt(tokenizer, image_token_id):
    for record in (make_record("<image>\nWhich?"), make_record("<image>\nWhich?", "7")):
        sample = Encoder(QA, tokenizer, image_token_id, PAD).prompt(record, [IMAGE])
        assert show(sample, tokenizer) == ("<s>" + "#" * 16 + "\nWhich?", "")
    with pytest.raises(ValueError, match=says("made.json[0]", "id r1", "prompt", "24 tokens", "limit")):
        Encoder(QA, tokenizer, image_token_id, PAD, max_length=20).prompt(record, [IMAGE])


def test_prompt_is_the_start_of_the_training_sample(golden, golden_tokenizer):
    tokenizer = golden_tokenizer("sp_legacy_false")
    record = make_record("<image>\nWhat?", "A cat.", "Sure?", "Yes.")
    for template in (V1, QA):
        sample = Encoder(template, tokenizer, 10**6, PAD).train(record, [IMAGE])
        prompt = Encoder(template, tokenizer, 10**6, PAD).prompt(record, [IMAGE])
        length = len(prompt.input_ids)
        assert torch.equal(sample.input_ids[:length], prompt.input_ids)
        assert sample.labels[length - 1] == IGNORE_INDEX and (sample.labels[length:] != IGNORE_INDEX).all()


LONG = make_record("<image>\nOne?", "1", "Two?", "2", "<image> three?", "3", "Four?")
FULL = "<s>" + "#" * 16 + "\nOne? 1\nTwo? 2\n" + "#" * 16 + " three? 3\nFour?"
LIMITS = {  # most tokens -> what is left (the byte tokenizer makes one token per character, and one of <s>)
    100: FULL,
    len(FULL) - 2: FULL,
    len(FULL) - 3: FULL.removesuffix("Four?"),
    len(FULL) - 8: "<s>" + "#" * 16 + "\nOne? 1\nTwo? 2\n",
    40: "<s>" + "#" * 16 + "\nOne? 1\nTwo? 2\n",
    25: "<s>" + "#" * 16 + "\nOne? 1\n",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_truncation_by_turns(tokenizer, image_token_id, limit):
    sample = Encoder(QA, tokenizer, image_token_id, PAD, limit, "turns").train(LONG, [IMAGE, IMAGE])
    assert show(sample, tokenizer)[0] == LIMITS[limit]
    assert len(sample.images) == len(sample.image_spans) == LIMITS[limit].count("#") // 16
    assert len(sample.input_ids) <= limit


def test_truncation_by_turns_keeps_an_answer(tokenizer, image_token_id):
    with pytest.raises(ValueError, match=says("id r1", "25 tokens", "16", "24")):
        Encoder(QA, tokenizer, image_token_id, PAD, 24, "turns").train(LONG, [IMAGE, IMAGE])


@pytest.mark.parametrize(
    ("limit", "spans", "trained"),
    [
        (100, [(1, 17), (32, 48)], " 1\n 2\n 3\n"),
        (40, [(1, 17), (32, 40)], " 1\n 2\n"),
        (32, [(1, 17)], " 1\n 2\n"),
        (23, [(1, 17)], " "),
        (10, [(1, 10)], ""),
        (1, [], ""),
    ],
)
def test_truncation_by_tokens(tokenizer, image_token_id, limit, spans, trained):
    sample = Encoder(QA, tokenizer, image_token_id, PAD, limit, "tokens").train(LONG, [IMAGE, IMAGE])
    text, target = show(sample, tokenizer)
    assert list(sample.image_spans) == spans and len(sample.images) == len(spans) and target == trained
    assert "<s>" + text.removeprefix("<s>")[: limit - 1] == text and FULL.startswith(text)


@pytest.mark.parametrize("truncation", ["turns", "tokens"])
@pytest.mark.parametrize("limit", [None, 300, 241])
def test_lengths_from_sizes_alone(tokenizer, image_token_id, truncation, limit):
    sizes = [(120, 50), (57, 131)]
    arguments = (V1, tokenizer, image_token_id, ANYRES, limit, truncation)
    sample = Encoder(*arguments).train(LONG, [ImageInput(torch.empty(0), size) for size in sizes])
    assert Encoder(*arguments).length(LONG, sizes) == len(sample.input_ids) <= (limit or 10**4)


def test_the_image_token_written_out_is_refused(tokenizer, image_token_id):
    record = make_record(f"What is {tokenizer.image_token}?", "A token.")
    with pytest.raises(ValueError, match=says("id r1", "text", "image token")):
        Encoder(QA, tokenizer, image_token_id, PAD).train(record, [])


@pytest.mark.parametrize(
    ("record", "images", "message"),
    [
        (make_record("Hello?"), 0, says("no answer")),
        (make_record("Hello?", ""), 0, says("no answer")),
        (make_record("<image>", "a"), 0, r"\b1 <image>.*\b0 image"),
        (make_record("b", "a"), 1, r"\b0 <image>.*\b1 image"),
        (make_record(), 0, says("no question")),
    ],
)
def test_bad_records_are_named(tokenizer, image_token_id, record, images, message):
    with pytest.raises(ValueError, match=message) as error:
        Encoder(V1, tokenizer, image_token_id, PAD).train(record, [IMAGE] * images)
    assert "made.json[0] (id r1)" in str(error.value)


def test_unknown_truncation(tokenizer, image_token_id):
    with pytest.raises(ValueError, match=says("truncation 'words'", "turns", "tokens")):
        Encoder(QA, tokenizer, image_token_id, PAD, 10, "words")
