"""Records -> ids and labels: equal to the official code where that is right, as a user expects where it is not; cutting
at turns costs a constant number of tokenisations and is what trying every cut gives."""

from __future__ import annotations

import json
import pickle
import random
import re
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import llava_pdrop.data.tokens as module
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.images import image_size
from llava_pdrop.data.labels import IMAGE_SLOT, encode_pieces, expand_slots
from llava_pdrop.data.records import read_records
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.errors import RecordError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.model.stream import layouts_of
from llava_pdrop.schedule import Schedule
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


def test_system_prompts_and_answers_that_are_not_learnt(tokenizer, image_token_id):
    record = make_record("<image>\nWhich?", "7", "Sure?", "8")
    turns = (record.turns[0], replace(record.turns[1], learnt=False), *record.turns[2:])
    record = replace(record, system="Be brief.", turns=turns)
    for name, before in (("qa", "Be brief.\n"), ("v1", "Be brief. USER: ")):
        encoder = Encoder(TEMPLATES[name], tokenizer, image_token_id, PAD)
        sample = encoder.train(record, [IMAGE])
        text, target = show(sample, tokenizer)
        assert text.startswith(f"<s>{before}{'#' * 16}\nWhich?") and "7" in text
        assert target in (" 8\n", " 8</s>") and len(PackedBatch.pack([sample]).answer_starts[0]) == 1
        assert encoder.lengths([record], [[IMAGE.size]]) == [len(sample.input_ids)]
        prompt = show(encoder.prompt(record, [IMAGE]), tokenizer)[0]
        assert prompt == text[: len(prompt)] and len(prompt) > 40
    with pytest.raises(RecordError, match=says("id r1", "no place", "system prompt")):
        Encoder(TEMPLATES["gemma"], tokenizer, image_token_id, PAD).train(record, [IMAGE])
    nothing = replace(record, turns=turns[:2])
    with pytest.raises(RecordError, match=says("id r1", "no answer", "loss: false", "weight: 0")):
        Encoder(QA, tokenizer, image_token_id, PAD).train(nothing, [IMAGE])


@pytest.mark.parametrize("template", ["qa", "v1", "qwen_2", "llava_v0"])
@pytest.mark.parametrize(
    "answer", ["Here: <image> it is", "<image>", "<image> and more", "it <image>", "<image><image> two"]
)
def test_an_image_in_an_answer_is_part_of_it(tokenizer, image_token_id, template, answer):
    """What ranks is a text token of the instruction, once per answer; no image token ever does."""
    record = make_record("<image>\nShow me", answer, "And?", "no")
    images = [IMAGE] * (1 + answer.count("<image>"))
    encoder = Encoder(TEMPLATES[template], tokenizer, image_token_id, PAD)
    for texts in (record, replace(record, turns=record.turns[:2])):
        sample = encoder.train(texts, images)
        (starts,) = PackedBatch.pack([sample]).answer_starts
        assert len(starts) == len(texts.turns) // 2
        bare = encoder.train(make_record("<image>\nShow me", "x"), [IMAGE])
        assert starts[0] == PackedBatch.pack([bare]).answer_starts[0][0]
        assert all(sample.input_ids[start - 1] != image_token_id for start in starts)


def test_an_image_that_no_query_sees_stays_whole(tokenizer, image_token_id):
    schedule = Schedule(layers=(1,), ratios=(0.5,))

    def kept(*texts):
        sample = Encoder(QA, tokenizer, image_token_id, PAD).train(make_record(*texts), [IMAGE, IMAGE])
        layout = layouts_of(PackedBatch.pack([sample]), schedule, PAD)[1]
        return [stop - start for start, stop in layout.image_spans]

    assert kept("<image>\nShow me", "Here: <image> it is") == [8, 16]
    assert kept("<image>\nShow me", "Here: <image> it is", "And?", "no") == [8, 8]
    assert kept("<image>\nShow me", "no", "<image>?") == [8, 8]  # as the official code does with what is never asked


@pytest.mark.parametrize("place", ["question", "answer", "system"])
@pytest.mark.parametrize("token", ["</s>", "<s>"])
def test_control_tokens_in_a_text_are_refused(tokenizer, image_token_id, place, token):
    texts = {
        name: f"It is {token}, the end." if name == place else "It is." for name in ("question", "answer", "system")
    }
    record = replace(make_record(texts["question"], texts["answer"]), system=texts["system"])
    encoder = Encoder(QA, tokenizer, image_token_id, PAD)
    for use in (encoder.train, encoder.prompt):
        with pytest.raises(RecordError, match=says("made.json[0]", "id r1", repr(token), "command")) as error:
            use(record, [])
        assert error.value.kind == "control_token"
    (found,) = encoder.lengths([record], [[]])
    assert isinstance(found, RecordError) and found.kind == "control_token"


def test_a_control_token_that_a_moved_image_leaves_behind(tokenizer, image_token_id):
    encoder = Encoder(V1, tokenizer, image_token_id, PAD)
    with pytest.raises(RecordError, match=says("made.json[0]", "'</s>'", "command")):
        encoder.train(make_record("</<image>s>", "It is."), [IMAGE])
    Encoder(QA, tokenizer, image_token_id, PAD).train(make_record("</<image>s>", "It is."), [IMAGE])  # moves none


def test_the_unknown_token_and_what_only_looks_like_a_command_are_text(tokenizer, image_token_id):
    record = make_record("What is <unk>, </S>, < /s>, <|im_end|>?", "No </p> command.")
    assert show(Encoder(QA, tokenizer, image_token_id, PAD).train(record, []), tokenizer)[1] == " No </p> command.\n"


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
    with pytest.raises(ValueError, match=says("truncation", "'words'", "turns", "tokens")):
        Encoder(QA, tokenizer, image_token_id, PAD, 10, "words")


WORDS = [
    "",
    "Yes",
    " two  spaces ",
    "\n\n",
    "9",
    "USER: no",
    "a longer answer, with words",
    "日本語",
    "</b>",
    "😀👍🏽",
    "##",
]


@cache
def load(directory, name):
    return AutoTokenizer.from_pretrained(directory / "tokenizers" / name)


def random_record(rng: random.Random, rounds: int) -> tuple[Record, list[tuple[int, int]]]:
    """Rounds of odd texts, images in some questions, often a question without an answer at the end."""
    turns, sizes = [], []
    for number in range(rounds):
        question = " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))
        if rng.random() < 0.3:
            sizes.append((rng.randint(1, 99), rng.randint(1, 99)))
            question = rng.choice([f"<image>\n{question}", f"{question} <image> there"])
        turns.append(Turn("human", question))
        if number < rounds - 1 or rng.random() < 0.5:
            turns.append(Turn("gpt", " ".join(rng.choices(WORDS, k=rng.randint(1, 4))) if rng.random() < 0.8 else ""))
    return Record(f"r{rng.random()}", tuple(turns), (), "made.json"), sizes


def slow_truncation(encoder: Encoder, record: Record, sizes) -> tuple[list[int], list[int], list] | None:
    """Tokenises the first n rounds for every n, the most rounds first; None where nothing fits."""
    rounds = encoder.template.rounds(record.turns)
    for count in range(len(rounds), 0, -1):
        ids, labels, _ = encode_pieces(encoder.template.pieces(rounds[:count]), encoder.tokenizer)
        own = sizes[: ids.count(IMAGE_SLOT)]
        result = expand_slots(ids, labels, own, encoder.image_token_id, encoder.geometry)
        if len(result[0]) <= encoder.max_length:
            return result if set(result[1]) != {IGNORE_INDEX} else None
    return None


@pytest.mark.parametrize("tokenizer_name", ["sp_legacy_false", "sp_legacy_true"])
@pytest.mark.parametrize("template", ["v1", "qa", "llava_llama_2", "mpt", "qwen_2", "llava_v0"])
def test_cutting_at_turns_is_trying_every_cut(golden, template, tokenizer_name):
    rng, tokenizer = random.Random(template), load(golden, tokenizer_name)
    rejected = shortened = 0
    for _ in range(40):
        record, sizes = random_record(rng, rng.randint(1, 6))
        for limit in (rng.randint(40, 400), rng.randint(100, 200)):
            encoder = Encoder(TEMPLATES[template], tokenizer, 10**6, PAD, limit)
            expected = slow_truncation(encoder, record, sizes)
            images = [ImageInput(torch.empty(0), size) for size in sizes]
            if expected is None:
                rejected += 1
                with pytest.raises(RecordError):
                    encoder.train(record, images)
                continue
            sample = encoder.train(record, images)
            assert (sample.input_ids.tolist(), sample.labels.tolist()) == expected[:2]
            assert list(sample.image_spans) == expected[2] and len(sample.images) == len(expected[2])
            shortened += len(sample.images) < len(sizes)
    assert rejected and shortened


def test_cutting_a_long_conversation_tokenises_a_few_cuts_only(tokenizer, image_token_id, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "encode_pieces", lambda *args: calls.append(1) or encode_pieces(*args))
    turns = tuple(Turn("gpt" if i % 2 else "human", f"number {i}") for i in range(2000))
    encoder = Encoder(TEMPLATES["v1"], tokenizer, image_token_id, PAD, 20_000)
    length = encoder.length(Record("r", turns, (), "made.json"), [])
    one_round = len("USER: number 1234 ASSISTANT: number 1235") + 1
    assert 20_000 - one_round < length <= 20_000 and len(calls) <= 3


def test_a_cut_that_joins_letters_with_the_next_round(golden):
    """Two rounds together may have fewer tokens than the tokens that start in them, and the other way round."""
    tokenizer = load(golden, "bpe_neox")
    template = replace(TEMPLATES["qa"], end="")
    record = Record("r", tuple(Turn("gpt" if i % 2 else "human", "the") for i in range(12)), (), "made.json")
    for limit in range(2, 30):
        encoder = Encoder(template, tokenizer, 10**6, PAD, limit)
        expected = slow_truncation(encoder, record, [])
        assert expected is not None and encoder.train(record, []).input_ids.tolist() == expected[0]


@pytest.mark.parametrize("truncation", ["turns", "tokens"])
@pytest.mark.parametrize("limit", [None, 150])
@pytest.mark.parametrize("template", ["v1", "qa", "plain", "mpt"])
@pytest.mark.parametrize("tokenizer_name", ["sp_legacy_false", "sp_legacy_true", "sp_nobos", "bpe_neox"])
def test_many_lengths_at_once(golden, tokenizer_name, template, limit, truncation):
    if not (golden / "tokenizers" / tokenizer_name).exists():
        pytest.skip(f"{golden} has no tokenizer {tokenizer_name}")
    rng, tokenizer = random.Random(1), load(golden, tokenizer_name)
    records, sizes = map(list, zip(*(random_record(rng, 1 if template == "plain" else 4) for _ in range(60))))
    records[3] = replace(records[3], turns=(Turn("human", "a"), Turn("human", "b")))
    records[5], sizes[5] = replace(records[5], turns=(Turn("human", "<image>"), Turn("gpt", "no"))), [(5, 5), (7, 7)]
    records[7] = replace(records[7], template="unheard of")
    records[8] = replace(records[8], template="llava_llama_2")
    written_out = Turn("human", f"say {tokenizer.eos_token}")
    records[9] = replace(records[9], turns=(written_out, Turn("gpt", "no")))
    encoder = Encoder(TEMPLATES[template], tokenizer, tokenizer.eos_token_id, PAD, limit, truncation)
    results = encoder.lengths(records, sizes)
    assert [one_length(encoder, record, own) for record, own in zip(records, sizes)] == in_words(results)

    encoder = replace(encoder, image_token_id=10**6)
    results = encoder.lengths(records, sizes)
    assert [one_length(encoder, record, own) for record, own in zip(records, sizes)] == in_words(results)
    results = in_words(results)
    assert "two turns by 'human'" in results[3] and "image(s)" in results[5] and "unheard of" in results[7]
    assert any(isinstance(result, int) for result in results)


def in_words(results: list[int | RecordError]) -> list[int | str]:
    return [result.reason if isinstance(result, RecordError) else result for result in results]


def one_length(encoder: Encoder, record: Record, sizes) -> int | str:
    try:
        return encoder.length(record, sizes)
    except RecordError as error:
        return error.reason


def test_texts_that_come_again_are_tokenised_once(tokenizer, image_token_id, monkeypatch):
    seen: list[list[str]] = []
    count = module.token_counts
    monkeypatch.setattr(module, "token_counts", lambda texts, *rest: seen.append(list(texts)) or count(texts, *rest))
    monkeypatch.setattr(Encoder, "length", lambda *args: pytest.fail("one by one"))
    records = [Record("r", (Turn("human", "<image>"), Turn("gpt", str(i % 3))), (), "made.json") for i in range(1500)]
    lengths = Encoder(TEMPLATES["v1"], tokenizer, image_token_id, PAD, 1000).lengths(records, [[(5, 5)]] * 1500)
    assert len(set(lengths)) == 1 and [len(texts) for texts in seen] == [4, 4]


def test_half_a_character_is_refused_with_the_record(golden) -> None:
    """JSON can spell a lone surrogate; tokenizers raise a TypeError that names nothing."""
    encoder = Encoder(TEMPLATES["v1"], load(golden, "sp_legacy_false"), 999, PAD)
    broken = Record("b", (Turn("human", "What is \ud83d this?"), Turn("gpt", "x")), (), "made.json[3]")
    with pytest.raises(RecordError, match=says("made.json[3]", "half a character", r"\ud83d")):
        encoder.train(broken, [])
    (error,) = encoder.lengths([broken], [[]])
    assert isinstance(error, RecordError) and "half a character" in error.reason and error.kind == "not_tokenised"


def test_a_record_without_an_answer_says_its_kind(tokenizer, image_token_id) -> None:
    """The kind comes from the code that refuses it: words of the user's that sound like it do not count."""
    encoder = Encoder(TEMPLATES["v1"], tokenizer, image_token_id, PAD)
    empty = Record("a", (Turn("human", "What?"), Turn("gpt", "")), (), "made.json[0]")
    sounds = replace(empty, id="b", template="nothing to learn")
    for record, kind in ((empty, "no_supervised_token"), (sounds, None)):
        with pytest.raises(RecordError) as caught:
            encoder.train(record, [])
        (listed,) = encoder.lengths([record], [[]])
        assert isinstance(listed, RecordError)
        for error in (caught.value, listed, pickle.loads(pickle.dumps(listed))):
            assert (error.kind, error.origin, error.id) == (kind, record.origin, record.id)


def test_a_picture_in_a_system_prompt_is_refused(tokenizer, image_token_id):
    """By the count of tokens, too, which does without the text being put together."""
    turns = (Turn("human", "Why?"), Turn("gpt", "So."))
    record = Record("r", turns, (), "d.json[0]", None, "<image>\nBe brief.")
    encoder = Encoder(TEMPLATES["chatml"], tokenizer, image_token_id, PAD)
    (length,) = encoder.lengths([record], [[]])
    assert isinstance(length, RecordError) and re.search(says("d.json[0]", "system prompt", "question"), str(length))
    with pytest.raises(RecordError, match=says("d.json[0]", "system prompt", "question")):
        encoder.train(record, [])
