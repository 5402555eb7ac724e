"""Tokenizer files for transformers 4.37 and tokenizers 0.15, which are not here: `read_as_0_15` holds what they accept,
as their sources read it (tokenizers 0.15: src/models/bpe/serialization.rs, src/pre_tokenizers/metaspace.rs)."""

from __future__ import annotations

import copy
import json

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from llava_pdrop.checkpoint.old_tokenizers import KNOWN, PROBE, for_tokenizers_0_15, write_original_tokenizer
from llava_pdrop.checkpoint.vocabulary import add_special_tokens
from llava_pdrop.files import read_json
from tests.messages import says
from tests.unit.checkpoint.layout_files import MODELS, TOKENIZER

NEOX = MODELS.parent / "tokenizers" / "bpe_neox"
CONFIG = LlamaConfig()
TEXTS = [PROBE, "USER: a  b</s>USER: x", "A. krill", "", "é\n\n"]
CLASSES = {"LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2TokenizerFast"}
"""Some of the classes of transformers 4.37, and all that are written here."""


def read_as_0_15(content: dict) -> None:
    """Raises `AssertionError` where tokenizers 0.15 finds no variant that a tokenizer.json matches."""
    assert {"version", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"} <= set(
        content
    )
    for section, known in KNOWN.items():
        read_part(content[section], section, known)
    merges = content["model"].get("merges", [])
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges), "merges are texts of two tokens"
    vocab = content["model"]["vocab"]
    assert all(half in vocab for merge in merges for half in merge.split(" "))
    assert "ignore_merges" not in content["model"]
    for token in content["added_tokens"]:
        assert set(token) == {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"}


def read_part(part: object, section: str, known: set[str]) -> None:
    if not isinstance(part, dict):
        assert part is None
        return
    assert part["type"] in known, (section, part)
    if part["type"] == "Metaspace":
        assert isinstance(part.get("add_prefix_space"), bool), "a required field of Metaspace before 0.19"
        assert part.get("prepend_scheme", "always") in ("always", "first", "never")
        assert "split" not in part, "it always splits"
    if part["type"] == "Sequence":
        for inner in next(value for value in part.values() if isinstance(value, list)):
            if section != "post_processor" or "type" in inner:
                read_part(inner, section, known)


def content_of(tokenizer) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def metaspace(scheme: str, split: bool) -> dict:
    """A tokenizer.json of LLaMA's kind, without its tokenizer.model."""
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    return content_of(AutoTokenizer.from_pretrained(TOKENIZER)) | {"pre_tokenizer": space}


def test_the_reader_notices_what_the_old_one_cannot_read():
    for content in (
        content_of(AutoTokenizer.from_pretrained(TOKENIZER)),
        content_of(AutoTokenizer.from_pretrained(NEOX)),
    ):
        with pytest.raises(AssertionError):
            read_as_0_15(content)


@pytest.mark.parametrize("name", ["sp_legacy_false", "sp_legacy_true"])
def test_a_sentencepiece_model_is_all_that_is_written(tmp_path, name):
    """As in the published LLaVAs; transformers 4.37 makes its fast tokenizer of it."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER.parent / name)
    before, vocab = [tokenizer(text).input_ids for text in TEXTS], tokenizer.get_vocab()
    add_special_tokens(tokenizer, len(tokenizer))
    assert write_original_tokenizer(tokenizer, tmp_path, CONFIG) == []
    assert {file.name for file in tmp_path.iterdir()} == {
        "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"
    }  # fmt: skip
    fields = read_json(tmp_path / "tokenizer_config.json")
    assert fields["tokenizer_class"] == "LlamaTokenizer" and fields["padding_side"] == "right"
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == vocab and [again(text).input_ids for text in TEXTS] == before


def test_a_tokenizer_without_one_is_written_in_the_old_format(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(NEOX)
    before = [tokenizer(text).input_ids for text in TEXTS]
    add_special_tokens(tokenizer, len(tokenizer))
    assert write_original_tokenizer(tokenizer, tmp_path, CONFIG) == []
    read_as_0_15(read_json(tmp_path / "tokenizer.json"))
    assert read_json(tmp_path / "tokenizer_config.json")["tokenizer_class"] in CLASSES
    assert [AutoTokenizer.from_pretrained(tmp_path)(text).input_ids for text in TEXTS] == before


def test_a_sentencepiece_model_of_another_tokenizer_is_left_out(tmp_path):
    """Somebody has added a word to the tokenizer.json and not to the model beside it."""
    source = tmp_path / "source"
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(source)
    (source / "tokenizer.model").write_bytes((TOKENIZER / "tokenizer.model").read_bytes())
    content = metaspace("always", False)
    content["model"]["vocab"]["xyzzy"] = 1000
    (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    fields = read_json(source / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "tokenizer_config.json").write_text(json.dumps(fields))
    changed = AutoTokenizer.from_pretrained(source)
    assert "xyzzy" in changed.get_vocab()
    write_original_tokenizer(changed, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    assert read_json(tmp_path / "out" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    read_as_0_15(read_json(tmp_path / "out" / "tokenizer.json"))


@pytest.mark.parametrize(
    ("scheme", "split"), [("always", False), ("never", False), ("always", True), ("never", True), ("first", True)]
)
def test_metaspace_is_said_as_0_15_says_it(scheme, split):
    content = metaspace(scheme, split)
    old = for_tokenizers_0_15(copy.deepcopy(content), "here")
    read_as_0_15(old)
    now, then = Tokenizer.from_str(json.dumps(content)), Tokenizer.from_str(json.dumps(old))
    for text in TEXTS:
        assert then.encode(text).ids == now.encode(text).ids, text


def test_merges_that_are_texts_already_stay():
    content = metaspace("always", False)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    assert for_tokenizers_0_15(content, "here")["model"]["merges"] == content["model"]["merges"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": metaspace("first", False)["pre_tokenizer"]}, says("here", "'first'", "tokenizer.model")),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [metaspace("always", False)["pre_tokenizer"]]}},
            says("here", "split", "Sequence"),
        ),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 5}}, says("here", "pre_tokenizer", "'FixedLength'")),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}]}},
            says("normalizer", "'ByteLevel'"),
        ),
        ({"decoder": {"type": "New"}}, says("decoder", "'New'", "llava-hf")),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [["a b", "c"]]}}, says("merges", "space")),
    ],
)
def test_what_0_15_cannot_say_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        for_tokenizers_0_15(metaspace("always", False) | change, "here")


def test_merges_that_new_readers_skip_are_said(tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(NEOX)
    content = content_of(tokenizer)
    content["model"]["ignore_merges"] = True
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    (line,) = write_original_tokenizer(tokenizer, tmp_path, CONFIG)
    assert "ignore_merges" in line and "0.19" in line
    read_as_0_15(read_json(tmp_path / "tokenizer.json"))
