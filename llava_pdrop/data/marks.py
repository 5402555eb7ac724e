"""Do a conversation template and a tokenizer fit? Both are chosen freely, and one that does not know the other's marks
takes ``</s>`` for ``<``, ``/``, ``s``, ``>``: every answer would then end in letters, and no generation at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields

from transformers import PreTrainedTokenizerBase

from llava_pdrop.data.conversation import TEMPLATES, Piece, Template
from llava_pdrop.data.labels import encode_pieces
from llava_pdrop.types import IGNORE_INDEX, IMAGE_MARKER

CONTROL = re.compile(r"<\|[^<>|\s]+\|>|(?<!<)</?[a-z_]+>(?!>)")
"""Marks that are one token each of the tokenizers they were made for: ``</s>``, ``<|im_end|>``, ``<start_of_turn>``."""

PLAIN = re.compile(r"\[/?[A-Z]+\]|<</?[A-Z]+>>")
"""Marks that some tokenizers know and others read as text: ``[INST]``."""


def split_marks(template: Template, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Marks of ``template`` that are no single token of ``tokenizer``: those that must be one, and those meant to be
    plain text (an end that is no control mark among them)."""
    text = "\n".join(_texts(template))
    control = [mark for mark in dict.fromkeys(CONTROL.findall(text)) if mark != IMAGE_MARKER]
    plain = [*PLAIN.findall(text), *([] if CONTROL.fullmatch(template.stop) else [template.stop])]
    split = [mark for mark in control if token_of(mark, tokenizer) is None]
    return split, [mark for mark in dict.fromkeys(plain) if token_of(mark, tokenizer) is None]


def fitting(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Templates with control marks that ``tokenizer`` knows, all of them."""
    return [
        name
        for name, template in TEMPLATES.items()
        if CONTROL.search(template.end) and not split_marks(template, tokenizer)[0]
    ]


def end_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ends an answer, in a list that is empty where its stop text is no single one."""
    token = token_of(template.stop, tokenizer)
    return [] if token is None else [token]


def token_of(mark: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ``mark`` is behind other text; None if it is several, or unknown."""
    labels = encode_pieces([Piece("a"), Piece(mark, is_target=True)], tokenizer).labels
    found = [label for label in labels if label != IGNORE_INDEX]
    return found[0] if len(found) == 1 and (found[0] != tokenizer.unk_token_id or mark == tokenizer.unk_token) else None


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """What may not stand in the text of a record, because ``tokenizer`` would take it for a command: its special
    tokens, and the marks of all templates as far as they are tokens of it. Not the unknown token, which commands
    nothing, and not the image token, which is looked for elsewhere."""
    marks = {mark for template in TEMPLATES.values() for text in _texts(template) for mark in CONTROL.findall(text)}
    added = tokenizer.added_tokens_decoder.values()
    found = {token.content for token in added if token.special or token.content in marks}
    found |= set(tokenizer.all_special_tokens)
    found -= {tokenizer.unk_token, getattr(tokenizer, "image_token", None), IMAGE_MARKER}
    names = sorted((token for token in found if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, names))) if names else None


def _texts(template: Template) -> Iterator[str]:
    for entry in fields(template):
        value = getattr(template, entry.name)
        if isinstance(value, Template):
            yield from _texts(value)
        elif isinstance(value, str) and entry.name != "empty":
            yield value
