"""Ids and labels of odd texts, and of tokenisers that do not say where their tokens lie."""

from __future__ import annotations

import json
import random
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llava_pdrop.data.conversation import TEMPLATES, Piece
from llava_pdrop.data.labels import IMAGE_SLOT, encode_pieces
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import IGNORE_INDEX, ImageInput, PackedBatch, Record, Turn
from tests.messages import says

PAD = ImageGeometry(56, 14)
IMAGE = ImageInput(torch.zeros(1, 3, 56, 56), (30, 20))
SENTENCEPIECE = ["sp_legacy_false", "sp_legacy_true", "sp_nobos", "sp_chatml_legacy_true", "sp_chatml_nobos"]
ODD_TEXTS = {
    "combining": "e\u0301 n\u0303 a\u0308\u0323",
    "emoji": "😀👍🏽 👨\u200d👩\u200d👧 🇫🇷",
    "cjk": "日本語の文字 这张图片",
    "zero width": "a\u200bb\u200d\ufeffc \u2060",
    "right to left": "\u200fوصف الصورة עברית\u200e",
    "spaces": "  a\u00a0b\u3000c \t\r\n d  ",
    "sentencepiece space": "a\u2581b \u2581",
    "tags": "<0x0A> <s> </s> <unk> <|im_end|> [INST]",
    "control": "\x00\x07\x7f",
}


class SlowLlama(SentencePieceBackend):
    """The slow LLaMA tokeniser as it was in transformers 4.37, on what transformers 5 has left of slow tokenisers."""

    def tokenize(self, text, **kwargs):
        if self.legacy or not text:
            return super().tokenize(text, **kwargs)
        tokens = super().tokenize("\u2581" + text.replace("\u2581", " "), **kwargs)
        joined = len(tokens) > 1 and tokens[0] == "\u2581" and tokens[1] in self.all_special_tokens
        return tokens[1:] if joined else tokens

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id] * self.init_kwargs["add_bos_token"] + token_ids_0


@cache
def load(directory, name, slow=False):
    folder = directory / "tokenizers" / name
    if not folder.exists():
        pytest.skip(f"{directory} has no tokenizer {name}")
    if not slow:
        return AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = {key: config[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token")}
    more = config.get("additional_special_tokens", [])
    return SlowLlama(
        vocab_file=str(folder / "tokenizer.model"), legacy=config["legacy"], extra_special_tokens=more, **special
    )


def pieces_of(template, *texts):
    turns = [Turn("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)]
    return TEMPLATES[template].pieces(TEMPLATES[template].rounds(turns))


def conversations(golden):
    if not (golden / "text" / "conversations.json").exists():
        pytest.skip(f"{golden} has no text/conversations.json")
    for name, turns in json.loads((golden / "text" / "conversations.json").read_text(encoding="utf-8")).items():
        if name != "not_alternating":
            yield [Turn(turn["from"], turn["value"]) for turn in turns]


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mpt", "llava_v0", "qwen_2"])
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_slow_tokenizer_gives_the_same(golden, name, template):
    """`tests/golden/test_text.py` holds the fast ones against the official ids and labels."""
    fast, slow = load(golden, name), load(golden, name, slow=True)
    assert fast.is_fast and not slow.is_fast
    for turns in conversations(golden):
        pieces = TEMPLATES[template].pieces(TEMPLATES[template].rounds(turns))
        theirs, ours = encode_pieces(pieces, fast), encode_pieces(pieces, slow)
        assert ours.ids == theirs.ids and ours.labels == theirs.labels
        assert ours.firsts == sorted(ours.firsts)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_slow_tokenizer_gives_the_same_on_random_texts(golden, name):
    fast, slow, rng = load(golden, name), load(golden, name, slow=True), random.Random(0)
    parts = [*" \n.'1\u2581é日😀\u200b\u0344", "a b", "  ", "</s>", "<s>", "<unk>", "<image>", "<|im_end|>", "<0x41>"]
    for _ in range(300):
        texts = ["".join(rng.choices(parts, k=rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
        pieces = [Piece(text, rng.random() < 0.5) for text in texts]
        assert encode_pieces(pieces, slow)[:2] == encode_pieces(pieces, fast)[:2], pieces


def test_a_fast_tokenizer_file_of_transformers_4_gives_the_same(golden):
    """There a normaliser, not the pre-tokeniser, writes the space in front of every text."""
    ours = load(golden, "sp_legacy_true")
    file = json.loads(ours.backend_tokenizer.to_str()) | {"pre_tokenizer": None}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    file["normalizer"] = {"type": "Sequence", "normalizers": [prepend, spaces]}
    backend = Tokenizer.from_str(json.dumps(file))
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for turns in conversations(golden):
        pieces = TEMPLATES["v1"].pieces(TEMPLATES["v1"].rounds(turns))
        assert encode_pieces(pieces, theirs)[:2] == encode_pieces(pieces, ours)[:2]


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS)
@pytest.mark.parametrize(
    ("name", "slow"),
    [("sp_legacy_false", False), ("sp_legacy_false", True), ("sp_legacy_true", True), ("bpe_neox", False)],
)
def test_odd_texts_as_question_and_answer(golden, name, slow, text):
    """Every letter of the answer is trained on, and none of the question, however the tokeniser splits them."""
    tokenizer = load(golden, name, slow)
    for template, lead, end in (("v1", " ", "</s>"), ("qa", " ", "\n")):
        ids, labels, _ = encode_pieces(pieces_of(template, f"<image>{text}", text, f"b{text}", f"{text}c"), tokenizer)
        assert ids.count(IMAGE_SLOT) == 1
        trained = [label for label in labels if label != IGNORE_INDEX]
        alone = [
            encode_pieces([Piece(f"<image>{lead}{answer}{end}", True)], tokenizer).labels
            for answer in (text, f"{text}c")
        ]
        expected = [token for part in alone for token in part if token != IGNORE_INDEX]
        assert spelling(trained, tokenizer) == spelling(expected, tokenizer)


def spelling(ids, tokenizer) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace(" ", "")


def test_byte_tokens_carry_the_label_of_their_letter(golden):
    tokenizer = load(golden, "sp_legacy_false")
    ids, labels, firsts = encode_pieces([Piece("日"), Piece("本", True)], tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", "▁", "<0xE6>", "<0x97>", "<0xA5>", "<0xE6>", "<0x9C>", "<0xAC>"]
    assert labels == [IGNORE_INDEX] * 5 + ids[5:] and firsts == [-1, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
def test_a_token_that_equals_the_padding_stays(golden, slow):
    """LLaMA pads with <unk>. The official batch masks it wherever it is (golden/README B15); packing has no mask."""
    tokenizer = load(golden, "sp_legacy_false", slow)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    record = Record("r", (Turn("human", "<image> a <unk> b"), Turn("gpt", "x <unk> y")), (), "made.json")
    sample = Encoder(TEMPLATES["v1"], tokenizer, 10**6, PAD).train(record, [IMAGE])
    assert sample.input_ids.tolist().count(0) == 2 and sample.labels.tolist().count(0) == 1
    batch = PackedBatch.pack([sample, sample])
    assert batch.input_ids.tolist() == sample.input_ids.tolist() * 2
    assert [int(batch.labels[place]) for place in batch.label_positions].count(0) == 2


class Shouting(PreTrainedTokenizer):
    """Changes the text it is given, so nobody can say where its tokens lie."""

    vocab_size = 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)}

    def _tokenize(self, text, **kwargs):
        return list(text.upper())

    def _convert_token_to_id(self, token):
        return ord(token)


def test_a_tokenizer_that_cannot_be_followed_is_named():
    with pytest.raises(ValueError, match=says("Shouting", "'ello'", "fast tokenizer")):
        encode_pieces([Piece("Hello", True)], Shouting())


SPACES = ["What?  ", "  \n ", "a   b", " \u3000 \t", "end \n\n", "   "]


@pytest.mark.parametrize("post", ["ByteLevel", "RobertaProcessing", "Sequence"])
def test_offsets_without_their_spaces(tokenizer, post):
    """GPT-2's and others' tokenizer.json say ``trim_offsets``: a token of spaces then lies behind the text."""
    trimming = {
        "ByteLevel": processors.ByteLevel(trim_offsets=True),
        "RobertaProcessing": processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True),
        "Sequence": processors.Sequence([processors.ByteLevel(trim_offsets=True)]),
    }
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = trimming[post]
    trimmed = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert b'"trim_offsets":true' in trimmed.backend_tokenizer.post_processor.__getstate__()
    for question in SPACES:
        for answer in SPACES:
            pieces = [Piece(f"<image>{question}"), Piece(answer, is_target=True), Piece(question)]
            right, ours = encode_pieces(pieces, tokenizer), encode_pieces(pieces, trimmed)
            bos = len(ours.ids) - len(right.ids[1:])
            assert (ours.ids[bos:], ours.labels[bos:], ours.firsts[bos:]) == tuple(part[1:] for part in right)
            learnt = [label for label in ours.labels if label != IGNORE_INDEX]
            assert trimmed.decode(learnt, clean_up_tokenization_spaces=False) == answer
