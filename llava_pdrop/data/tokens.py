"""Pieces of text -> token ids, labels and image placeholders: a `Sample`.

The text between two images is tokenised in one go, as LLaVA does, and every token takes its label from the piece its
first character lies in (fast tokenisers say where that is). Ids and labels are those of LLaVA's `preprocess_v1` and
`preprocess_plain` with the slow LLaMA tokeniser of transformers 4.37, except where that code masks a whole
conversation because its own counts disagree.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from llava_pdrop.data.conversation import Piece, Template
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.types import IGNORE_INDEX, IMAGE_MARKER, ImageInput, Record, Sample

IMAGE_SLOT = -200
"""Stands for a whole image in a list of ids before it is expanded (the number LLaVA uses)."""

Truncation = Literal["turns", "tokens"]
Size = tuple[int, int]


def build_sample(
    record: Record,
    images: Sequence[ImageInput],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    geometry: ImageGeometry,
    max_length: int | None = None,
    truncation: Truncation = "turns",
) -> Sample:
    """A record tokenised for training.

    Args:
        images: the record's images, in order.
        max_length: most tokens of the sample, image tokens included; None: no limit.
        truncation: what happens to a longer one. ``turns`` leaves out whole rounds from the end, so that no answer and
            no image is ever cut, and at least one answer stays. ``tokens`` cuts at ``max_length`` wherever that is, as
            LLaVA does: the last image may keep only part of its span, images behind the cut are left out, and a
            sample without any label is possible.

    Raises:
        ValueError: the conversation does not fit the template, or (``turns``) does not fit the limit or has no answer;
            names the record.
    """
    try:
        ids, labels, spans = _encode(
            record, [i.size for i in images], template, tokenizer, image_token_id, geometry, max_length, truncation
        )
    except ValueError as error:
        raise ValueError(f"{record.origin} (id {record.id}): {error}") from None
    return _sample(record.id, ids, labels, spans, images)


def prompt_sample(
    record: Record,
    images: Sequence[ImageInput],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    geometry: ImageGeometry,
    max_length: int | None = None,
) -> Sample:
    """A record tokenised for generation: up to where the answer to its last question starts, without labels. An answer
    the record gives to that question is not shown.

    Raises:
        ValueError: as `build_sample`, or the prompt is longer than ``max_length``; names the record.
    """
    try:
        pieces = template.generation_prompt(template.rounds(record.turns))
        ids, labels, spans = _expand_pieces(pieces, [i.size for i in images], tokenizer, image_token_id, geometry)
        if max_length is not None and len(ids) > max_length:
            raise ValueError(f"the prompt has {len(ids)} tokens, more than the limit of {max_length}; raise the limit")
    except ValueError as error:
        raise ValueError(f"{record.origin} (id {record.id}): {error}") from None
    return _sample(record.id, ids, labels, spans, images)


def sample_length(
    record: Record,
    sizes: Sequence[Size],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    geometry: ImageGeometry,
    max_length: int | None = None,
    truncation: Truncation = "turns",
) -> int:
    """Tokens `build_sample` will make of a record, from its text and the (width, height) of its images alone.

    Raises:
        ValueError: as `build_sample`.
    """
    try:
        return len(_encode(record, sizes, template, tokenizer, image_token_id, geometry, max_length, truncation)[0])
    except ValueError as error:
        raise ValueError(f"{record.origin} (id {record.id}): {error}") from None


def encode_pieces(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels of a text put together from pieces, each ``<image>`` being one `IMAGE_SLOT`.

    The beginning-of-sequence token comes first if the tokeniser adds one, as LLaVA's `tokenizer_image_token` does.

    Raises:
        ValueError: the tokeniser has no character offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not report character offsets; load the fast tokenizer")
    text = "".join(piece.text for piece in pieces)
    is_target = b"".join(bytes([piece.is_target]) * len(piece.text) for piece in pieces)

    empty = tokenizer("").input_ids
    ids = empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []
    labels = [IGNORE_INDEX] * len(ids)
    start = 0
    for number, chunk in enumerate(text.split(IMAGE_MARKER)):
        if number:
            ids.append(IMAGE_SLOT)
            labels.append(IGNORE_INDEX)
            start += len(IMAGE_MARKER)
        chunk_ids, firsts = _encode_text(chunk, tokenizer)
        targets = is_target[start : start + len(chunk)]
        ids += chunk_ids
        labels += [token if targets[first] else IGNORE_INDEX for token, first in zip(chunk_ids, firsts, strict=True)]
        start += len(chunk)
    return ids, labels


def expand_slots(
    ids: Sequence[int],
    labels: Sequence[int],
    sizes: Sequence[Size],
    image_token_id: int,
    geometry: ImageGeometry,
    max_length: int | None = None,
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Every `IMAGE_SLOT` replaced by as many ``image_token_id`` as its image has tokens, then cut at ``max_length``.

    LLaVA cuts twice, in the collator (an image still counting as one) and after merging; as an image never has less
    than one token, one cut at the end gives the same.

    Returns:
        ids (N), labels (N), and the span of every image that is left, the last one possibly cut short.

    Raises:
        ValueError: the number of slots is not the number of images, or the text holds the image token itself.
    """
    ids, labels = list(ids), list(labels)
    if ids.count(IMAGE_SLOT) != len(sizes):
        raise ValueError(f"{ids.count(IMAGE_SLOT)} {IMAGE_MARKER} marker(s) but {len(sizes)} image(s)")
    if image_token_id in ids:
        raise ValueError(
            f"the text contains the tokenizer's image token (id {image_token_id}) written out; remove it, or write "
            f"{IMAGE_MARKER} and name an image"
        )
    spans = []
    slot = -1
    for size in sizes:
        slot = ids.index(IMAGE_SLOT, slot + 1)
        count = geometry.num_tokens(size)
        ids[slot : slot + 1] = [image_token_id] * count
        labels[slot : slot + 1] = [IGNORE_INDEX] * count
        spans.append((slot, slot + count))
    if max_length is not None:
        spans = [(start, min(stop, max_length)) for start, stop in spans if start < max_length]
    return ids[:max_length], labels[:max_length], spans


def _encode(
    record: Record,
    sizes: Sequence[Size],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    geometry: ImageGeometry,
    max_length: int | None,
    truncation: Truncation,
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Ids, labels and image spans of a record. Rounds are left out from the end only, so the images that stay are the
    first ones."""
    if truncation not in ("turns", "tokens"):
        raise ValueError(f"unknown truncation '{truncation}'; known are turns, tokens")
    rounds = template.rounds(record.turns)
    if len(sizes) != (wanted := sum(turn.text.count(IMAGE_MARKER) for turn in record.turns)):
        raise ValueError(f"{wanted} {IMAGE_MARKER} marker(s) but {len(sizes)} image(s)")
    cut = max_length if truncation == "tokens" else None
    shortest = None
    for count in range(len(rounds), 0, -1):
        pieces = template.pieces(rounds[:count])
        ids, labels, spans = _expand_pieces(pieces, sizes, tokenizer, image_token_id, geometry, cut)
        if truncation == "tokens":
            return ids, labels, spans
        if labels.count(IGNORE_INDEX) == len(labels):
            break
        if max_length is None or len(ids) <= max_length:
            return ids, labels, spans
        shortest = f"{len(ids)} tokens ({sum(stop - start for start, stop in spans)} of them for {len(spans)} image(s))"
    if shortest is None:
        raise ValueError("it has no answer, or empty ones only, so there is nothing to learn")
    raise ValueError(
        f"up to the end of its first answer it has {shortest}, more than the limit of {max_length}; raise the limit or "
        "shorten the record"
    )


def _expand_pieces(
    pieces: Sequence[Piece],
    sizes: Sequence[Size],
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    geometry: ImageGeometry,
    max_length: int | None = None,
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """`encode_pieces` and `expand_slots`; images whose question is not among the pieces are left out."""
    ids, labels = encode_pieces(pieces, tokenizer)
    return expand_slots(ids, labels, sizes[: ids.count(IMAGE_SLOT)], image_token_id, geometry, max_length)


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a text without images, and the index of the first character of each.

    SentencePiece puts a space in front of every text. The fast LLaMA tokeniser leaves it out when the text starts with
    a space of its own, so that " A" becomes one token less; writing that space ourselves gives LLaVA's ids.
    """
    if not text:
        return [], []
    inserts: list[int] = []
    scheme = getattr(tokenizer.backend_tokenizer.pre_tokenizer, "prepend_scheme", "never")
    if scheme != "never":
        after = ["^"]
        if scheme == "always":  # "legacy" tokenisers: after every special token as well
            after += [re.escape(token) for token in tokenizer.all_special_tokens]
        inserts = [match.end() for match in re.finditer(f"(?:{'|'.join(after)})(?=[ \u2581])", text)]
    padded = text
    for place in reversed(inserts):
        padded = f"{padded[:place]} {padded[place:]}"
    encoded = tokenizer(padded, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    firsts = [first for first, _ in encoded.offset_mapping]
    if inserts:
        spaces = [place + i for i, place in enumerate(inserts)]
        firsts = [first - bisect_left(spaces, first) for first in firsts]
    return encoded.input_ids, firsts


def _sample(
    name: str, ids: list[int], labels: list[int], spans: list[tuple[int, int]], images: Sequence[ImageInput]
) -> Sample:
    return Sample(
        id=name,
        input_ids=torch.tensor(ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        images=tuple(images[: len(spans)]),
        image_spans=tuple(spans),
    )
