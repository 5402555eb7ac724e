"""The two tokens that Hugging Face's LLaVA has and the original does not, ``<image>`` and ``<pad>``, and their rows."""

from __future__ import annotations

from typing import Any

from transformers import AddedToken

from llava_pdrop.checkpoint.original import carried_by
from llava_pdrop.errors import UserError
from llava_pdrop.types import IMAGE_MARKER

PAD_TOKEN = "<pad>"
VOCABULARY_MULTIPLE = 64
"""Vocabularies grow to a multiple of this (32000 LLaMA tokens + <image> + <pad> -> 32064, as on the hub)."""


def add_special_tokens(tokenizer: Any, rows: int) -> int:
    """Gives ``tokenizer`` the token ``<image>``, and ``<pad>`` unless it has a pad token of its own, where it lacks
    them; returns the id of ``<image>``. A pad token that is also unk, bos or eos does not count: padding must not look
    like a token of the text.

    Args:
        rows: embeddings of the decoder.

    Raises:
        UserError: the tokenizer has more tokens than the decoder has embeddings.
    """
    known = tokenizer.get_vocab()
    needs_pad = tokenizer.pad_token is None or tokenizer.pad_token in (
        tokenizer.unk_token,
        tokenizer.bos_token,
        tokenizer.eos_token,
    )
    wanted = (IMAGE_MARKER, PAD_TOKEN) if needs_pad else (IMAGE_MARKER,)
    new = [AddedToken(token, special=True, normalized=False) for token in wanted if token not in known]
    if new and len(tokenizer) > rows:
        raise UserError(f"the tokenizer has {len(tokenizer)} tokens, but the decoder only {rows} embeddings")
    tokenizer.add_tokens(new, special_tokens=True)
    if needs_pad:
        tokenizer.pad_token = PAD_TOKEN
    return tokenizer.convert_tokens_to_ids(IMAGE_MARKER)


def rows_with_specials(rows: int, tokenizer: Any | None) -> int:
    """Vocabulary of a decoder of ``rows`` embeddings that is to hold all of ``tokenizer`` (None: two more tokens)."""
    needed = rows + 2 if tokenizer is None else len(tokenizer)
    return rows if needed <= rows else round_up(needed)


def round_up(rows: int) -> int:
    """The next multiple of `VOCABULARY_MULTIPLE`."""
    return -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def original_rows(config: Any, tokenizer: Any | None) -> int:
    """How many rows of a Hugging Face LLaVA's vocabulary were there before ``<image>`` and ``<pad>``.

    That number is written into the configs we make (``original_llava.vocab_size``). Without it, the rows from
    ``<image>`` on are extra exactly when no other token than these two comes behind, and the vocabulary is just the
    rounded-up number of tokens.
    """
    rows, first = config.text_config.vocab_size, config.image_token_id
    recorded = carried_by(config).get("vocab_size")
    if recorded is not None:
        return recorded
    tokens = first + 2 if tokenizer is None else len(tokenizer)
    later = [] if tokenizer is None else [t for t, i in tokenizer.get_vocab().items() if i > first and t != PAD_TOKEN]
    return first if not later and rows == round_up(tokens) else rows
