"""Fixtures of the data tests: the reference directory, a tokenizer and pictures made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference outputs: ``$PDROP_GOLDEN``, or the full directory beside the checkout, or the subset in it."""
    named = os.environ.get("PDROP_GOLDEN")
    choices = [Path(named)] if named else []
    choices += [REPOSITORY.parent / "shared" / "golden", REPOSITORY / "tests" / "golden" / "reference"]
    for choice in choices:
        if choice.is_dir():
            return choice
    pytest.skip("no reference directory: set PDROP_GOLDEN")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, ``<s>`` in front, ``</s>`` and the image token as special tokens."""
    special = ["<unk>", "<s>", "</s>", "<|picture|>"]
    vocab = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    result = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens={"image_token": "<|picture|>"},
    )
    result.add_bos_token = True
    result.update_post_processor()
    assert result("").input_ids == [1]
    return result


@pytest.fixture(scope="session")
def image_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    return tokenizer.image_token_id


@pytest.fixture
def picture(tmp_path: Path):
    """Writes a picture of the given size and returns its path."""

    def write(width: int = 30, height: int = 20, name: str = "picture.png", **options) -> Path:
        path = tmp_path / name
        Image.linear_gradient("L").resize((width, height)).convert("RGB").save(path, **options)
        return path

    return write
