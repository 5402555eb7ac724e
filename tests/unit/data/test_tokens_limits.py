"""Long conversations: cutting at turns costs a constant number of tokenisations and is what trying every cut gives;
counting many records at once is what counting one by one gives."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import AutoTokenizer

import llava_pdrop.data.tokens as module
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.labels import IMAGE_SLOT, encode_pieces, expand_slots
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.errors import RecordError
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import IGNORE_INDEX, ImageInput, Record, Turn
from tests.messages import says

PAD = ImageGeometry(56, 14)
WORDS = [
    "",
    "Yes",
    " two  spaces ",
    "\n\n",
    "9",
    "USER: no",
    "a longer answer, with words",
    "日本語",
    "</s>",
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
    assert isinstance(error, RecordError) and "half a character" in error.reason and error.kind is None


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
