"""Pieces of text -> token ids and labels, with one `IMAGE_SLOT` per image -> the same with images expanded.

The text between two images is tokenised in one go, as LLaVA does, and every token takes its label from the piece its
first character lies in. Where that is, fast tokenisers say themselves; the pieces of slow SentencePiece ones are laid
along the text. Ids and labels are those of LLaVA's ``preprocess`` with the slow LLaMA tokeniser of transformers 4.37,
except where that code miscounts (data/README.md lists how often and why).

Unicode: a character the vocabulary lacks becomes several byte tokens that all carry its label; nothing is normalised
here, so combining marks, zero-width characters and right-to-left text reach the tokeniser as they are written.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llava_pdrop.data.conversation import Piece
from llava_pdrop.errors import Unfit, UserError
from llava_pdrop.geometry import ImageGeometry, Size
from llava_pdrop.types import IGNORE_INDEX, IMAGE_MARKER

IMAGE_SLOT = -200
"""Stands for a whole image in a list of ids before it is expanded (the number LLaVA uses)."""

Expanded = tuple[list[int], list[int], list[tuple[int, int]]]
"""Ids (N), labels (N) and the [start, stop) of every image."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON may spell with an escape and no tokenizer can take."""

BYTE = re.compile("<0x([0-9A-F]{2})>")


class Encoded(NamedTuple):
    """``ids``, ``labels`` and, for every token, the place of its first character in the text: ``firsts`` (never
    falling; -1 for the beginning-of-sequence token)."""

    ids: list[int]
    labels: list[int]
    firsts: list[int]


def refuse_halves(text: str) -> None:
    """Raises `Unfit` if ``text`` holds half a character, which no tokeniser takes."""
    if broken := SURROGATE.search(text):
        raise Unfit(
            "not_tokenised",
            f"the text holds half a character (a lone surrogate, {broken[0]!a}) behind "
            f"{text[: broken.start()][-20:]!r}: remove it",
        )


def encode_pieces(pieces: Sequence[Piece], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """The text put together from ``pieces``, each ``<image>`` being one `IMAGE_SLOT`.

    The beginning-of-sequence token comes first if the tokeniser adds one, as LLaVA's `tokenizer_image_token` does. A
    token that equals the padding token (LLaMA: ``<unk>``) is a token like any other: nothing here masks by its number.

    Raises:
        UserError: the tokeniser reports no character offsets and its tokens do not spell the text, or the text holds
            half a character.
    """
    text = "".join(piece.text for piece in pieces)
    refuse_halves(text)
    is_target = b"".join(bytes([piece.is_target]) * len(piece.text) for piece in pieces)

    ids = bos_ids(tokenizer)
    labels, firsts = [IGNORE_INDEX] * len(ids), [-1] * len(ids)
    start = 0
    for number, chunk in enumerate(text.split(IMAGE_MARKER)):
        if number:
            ids.append(IMAGE_SLOT)
            labels.append(IGNORE_INDEX)
            firsts.append(start)
            start += len(IMAGE_MARKER)
        chunk_ids, chunk_firsts = _encode_text(chunk, tokenizer)
        targets = is_target[start : start + len(chunk)]
        ids += chunk_ids
        labels += [t if targets[first] else IGNORE_INDEX for t, first in zip(chunk_ids, chunk_firsts, strict=True)]
        firsts += [start + first for first in chunk_firsts]
        start += len(chunk)
    return Encoded(ids, labels, firsts)


def expand_slots(
    ids: Sequence[int],
    labels: Sequence[int],
    sizes: Sequence[Size],
    image_token_id: int,
    geometry: ImageGeometry,
    max_length: int | None = None,
) -> Expanded:
    """Every `IMAGE_SLOT` replaced by as many ``image_token_id`` as its image has tokens, then cut at ``max_length``.

    LLaVA cuts twice, in the collator (an image still counting as one) and after merging; as an image never has less
    than one token, one cut at the end gives the same.

    Returns:
        ids (N), labels (N), and the span of every image that is left, the last one possibly cut short.

    Raises:
        UserError: the number of slots is not the number of images, or the text holds the image token itself.
    """
    ids, labels = list(ids), list(labels)
    if ids.count(IMAGE_SLOT) != len(sizes):
        raise UserError(f"{ids.count(IMAGE_SLOT)} {IMAGE_MARKER} marker(s) but {len(sizes)} image(s)")
    if image_token_id in ids:
        raise Unfit(
            "image_token",
            f"the text contains the tokenizer's image token (id {image_token_id}) written out; remove it, or write "
            f"{IMAGE_MARKER} and name an image",
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


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token if the tokeniser adds one, else nothing."""
    empty = tokenizer.backend_tokenizer.encode("").ids if tokenizer.is_fast else tokenizer("").input_ids
    return empty[:1] if empty and empty[0] == tokenizer.bos_token_id else []


def token_counts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """How many tokens `encode_pieces` makes of each of some texts without images. For fast tokenisers only, which
    share the work among the cores (environment: TOKENIZERS_PARALLELISM) and skip the offsets."""
    padded = [_with_spaces(text, _inserts(text, tokenizer)) for text in texts]
    return [len(encoding) for encoding in _backend(tokenizer).encode_batch_fast(padded, add_special_tokens=False)]


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a text without images, and the index of the first character of each."""
    if not text:
        return [], []
    if not tokenizer.is_fast:
        tokens = tokenizer.tokenize(text)
        return tokenizer.convert_tokens_to_ids(tokens), _align(text, tokens, tokenizer)
    inserts = _inserts(text, tokenizer)
    padded = _with_spaces(text, inserts)
    encoding = _with_all_spaces(tokenizer).encode(padded, add_special_tokens=False)
    firsts = [first for first, _ in encoding.offsets]
    if inserts:
        spaces = [place + i for i, place in enumerate(inserts)]
        firsts = [first - bisect_left(spaces, first) for first in firsts]
    return encoding.ids, firsts


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The Rust tokeniser itself, which spares the detour through lists nobody asked for, set to change no length."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _with_all_spaces(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """`_backend`, or where that takes the spaces off the places of its tokens (``trim_offsets``: a token of spaces
    would lie behind the text) a copy that does not, and makes the same tokens."""
    backend = _backend(tokenizer)
    if backend.post_processor is None or b'"trim_offsets":true' not in backend.post_processor.__getstate__():
        return backend
    size, copy = _copies.get(tokenizer, (0, backend))
    if size != len(tokenizer):
        copy = Tokenizer.from_str(backend.to_str())
        copy.post_processor = None  # it only adds special tokens, which nobody asks for, and trims
        _copies[tokenizer] = len(tokenizer), copy
    return copy


_copies: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Tokenizer]] = WeakKeyDictionary()
"""Tokenizer -> its number of tokens, and its copy that trims no offsets."""


def _inserts(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Where a space has to be written into a text before the fast LLaMA tokeniser sees it.

    SentencePiece puts a space in front of every text. The fast tokeniser leaves it out when the text starts with a
    space of its own, so that " A" becomes one token less; writing that space ourselves gives LLaVA's ids.
    """
    scheme = getattr(tokenizer.backend_tokenizer.pre_tokenizer, "prepend_scheme", "never")
    if scheme == "never":
        return []
    after = ["^"]
    if scheme == "always":  # "legacy" tokenisers: after every special token as well
        after += [re.escape(token) for token in tokenizer.all_special_tokens]
    return [match.end() for match in re.finditer(f"(?:{'|'.join(after)})(?=[ \u2581])", text)]


def _with_spaces(text: str, places: Sequence[int]) -> str:
    for place in reversed(places):
        text = f"{text[:place]} {text[place:]}"
    return text


def _align(text: str, tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """First character of each token of a tokeniser without offsets, by laying its pieces along the text.

    A piece stands for its own letters, "▁" for a space, <0xAB> for a byte, an added token for itself. The space that
    SentencePiece puts in front of every text (some do after every added token) stands for nothing.
    """
    spaced = text.replace("\u2581", " ")
    data, ends = spaced.encode(), list(accumulate(len(character.encode()) for character in spaced))
    added = tokenizer.get_added_vocab()
    firsts, at = [], 0
    for is_added, group in groupby(tokens, added.__contains__):
        spelled = [token.encode() if is_added else _spell(token) for token in group]
        if not is_added and spelled[0].startswith(b" ") and not data.startswith(b"".join(spelled), at):
            spelled[0] = spelled[0][1:]
        for letters in spelled:
            if not data.startswith(letters, at):
                break
            firsts.append(min(bisect_right(ends, at), len(text) - 1))
            at += len(letters)
    if at < len(data) or len(firsts) < len(tokens):
        raise UserError(
            f"{type(tokenizer).__name__} does not say where its tokens lie in a text, and they do not spell it from "
            f"{data[at : at + 30].decode(errors='replace')!r} on; load a fast tokenizer (tokenizer.json)"
        )
    return firsts


def _spell(token: str) -> bytes:
    byte = BYTE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()
