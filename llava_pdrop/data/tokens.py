"""Records -> samples: conversations tokenised, images expanded to their tokens, long records shortened.

What becomes of unusual records:

- several images, in any turn: each stays where it is written; a record without images is a sample without spans
- an answer with ``loss: false`` or ``weight: 0``: written and not trained on
- a system prompt: written where the template has a place for one, else the record is refused
- an empty answer: as the template says (`Template.empty`); a record with empty answers only is refused, unless the
  template trains on them
- a question nobody answered at the end: it is written and not trained on
- a greeting in front of the first question: left out
- a record longer than the limit: `Encoder.truncation`

- a control token of the tokenizer written out in a text (``</s>``): refused, as it would act like the template's own
- an image inside an answer: part of it, and not trained on

A record that cannot be used is a `RecordError`, which names it and says why.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

import torch
from transformers import PreTrainedTokenizerBase

from llava_pdrop.config.schema import Config
from llava_pdrop.data.conversation import Piece, Round, Template, template_for, template_of
from llava_pdrop.data.labels import (
    IMAGE_SLOT,
    SURROGATE,
    Encoded,
    Expanded,
    bos_ids,
    encode_pieces,
    expand_slots,
    token_counts,
)
from llava_pdrop.data.marks import control_tokens
from llava_pdrop.errors import RecordError, Unfit, UserError, check_name
from llava_pdrop.geometry import ImageGeometry, Size
from llava_pdrop.types import IGNORE_INDEX, IMAGE_MARKER, ImageInput, Record, Sample

Truncation = Literal["turns", "tokens"]

NOTHING_TO_LEARN = "it has no answer, or only empty ones and such with loss: false or weight: 0: nothing to learn"

TEXTS_AT_A_TIME = 1024
"""Records whose texts `Encoder.lengths` tokenises in one call."""


class Unlabelled(int):
    """The number of tokens of a sample of which none is trained on."""


@dataclass(frozen=True)
class Encoder:
    """How the records of a run become samples.

    Attributes:
        template: the conversation format of records that do not name their own.
        tokenizer: fast, or a slow SentencePiece one.
        image_token_id: what an image is expanded to; need not be known to the tokeniser.
        geometry: how many tokens an image has.
        max_length: most tokens of a sample, image tokens included; None: no limit.
        truncation: what happens to a longer training sample. ``turns`` leaves out whole rounds from the end, so that no
            answer and no image is ever cut, and at least one answer stays. ``tokens`` cuts at ``max_length`` wherever
            that is, as LLaVA does: the last image may keep only part of its span, images behind the cut are left out,
            and a sample without any label is possible.

    Raises:
        UserError: unknown ``truncation``.
    """

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    geometry: ImageGeometry
    max_length: int | None = None
    truncation: Truncation = "turns"

    def __post_init__(self) -> None:
        check_name("truncation", self.truncation, get_args(Truncation))

    @staticmethod
    def of(config: Config, tokenizer: PreTrainedTokenizerBase, image_token_id: int, geometry: ImageGeometry) -> Encoder:
        """For the records of ``config``, with the template, the limit and the truncation that it names.

        Raises:
            ConfigError: it names a template that there is not.
        """
        section = config.data
        return Encoder(template_of(config), tokenizer, image_token_id, geometry, section.max_length, section.truncation)

    def train(self, record: Record, images: Sequence[ImageInput]) -> Sample:
        """A record tokenised for training; ``images`` are the record's, in order.

        Raises:
            RecordError: the conversation does not fit the template, or (``turns``) does not fit the limit or has no
                answer.
        """
        with _naming(record):
            expanded = self._encode(record, [image.size for image in images])
        inside = [turn.role == "gpt" for turn in record.turns for _ in range(turn.text.count(IMAGE_MARKER))]
        return _sample(record.id, expanded, images, inside if any(inside) else ())

    def prompt(self, record: Record, images: Sequence[ImageInput]) -> Sample:
        """A record tokenised for generation: up to where the answer to its last question starts, without labels. An
        answer the record gives to that question is not shown.

        Raises:
            RecordError: as `train`, or the prompt is longer than the limit.
        """
        with _naming(record):
            sizes = [image.size for image in images]
            template = self._template(record)
            pieces = template.generation_prompt(self._rounds(template, record, sizes))
            ids, labels, spans = self._expand(encode_pieces(pieces, self.tokenizer), sizes)
            if not self._fits(ids):
                raise UserError(
                    f"the prompt has {len(ids)} tokens, more than the limit of {self.max_length}; raise the limit"
                )
        return _sample(record.id, (ids, [IGNORE_INDEX] * len(labels), spans), images)

    def length(self, record: Record, sizes: Sequence[Size]) -> int:
        """Tokens `train` will make of a record (`Unlabelled` where none of them is trained on), from its text and the
        (width, height) of its images alone.

        Raises:
            RecordError: as `train`.
        """
        with _naming(record):
            expanded = self._encode(record, sizes)
        return len(expanded[0]) if _supervised(expanded) else Unlabelled(len(expanded[0]))

    def lengths(self, records: Sequence[Record], sizes: Sequence[Sequence[Size]]) -> list[int | RecordError]:
        """`length` of many records; where it would raise, the error stands in the result.

        Much faster than one by one with a fast tokeniser: texts are only counted, many at a time on all cores, and
        those that come again (the system prompt in front of an image) once. What that cannot decide (too long for the
        limit, perhaps without an answer, wrong) goes through `length`.
        """
        result: list[int | RecordError] = []
        for start in range(0, len(records), TEXTS_AT_A_TIME):
            stretch = slice(start, start + TEXTS_AT_A_TIME)
            result += self._block_lengths(records[stretch], sizes[stretch])
        return result

    def _block_lengths(self, records: Sequence[Record], sizes: Sequence[Sequence[Size]]) -> list[int | RecordError]:
        special, image = self.tokenizer.all_special_tokens, None
        if self.tokenizer.is_fast:
            image = self.tokenizer.backend_tokenizer.id_to_token(self.image_token_id)
        drafts = [
            self._countable(record, own, special, image) if self.tokenizer.is_fast else None
            for record, own in zip(records, sizes, strict=True)
        ]
        texts = list({text for draft in drafts for text in draft or () if text})
        counts = {"": 0} | (dict(zip(texts, token_counts(texts, self.tokenizer), strict=True)) if texts else {})
        bos = len(bos_ids(self.tokenizer))

        result: list[int | RecordError] = []
        for record, own, draft in zip(records, sizes, drafts, strict=True):
            if draft is not None:
                total = bos + sum(counts[text] for text in draft) + sum(map(self.geometry.num_tokens, own))
                if self.max_length is None or total <= self.max_length:
                    result.append(total)
                    continue
            try:
                result.append(self.length(record, own))
            except RecordError as error:
                result.append(error)
        return result

    def _countable(
        self, record: Record, sizes: Sequence[Size], special: Sequence[str], image: str | None
    ) -> list[str] | None:
        """The texts between the images if counting their tokens is all there is to do, else None."""
        try:
            template = self._template(record)
            pieces = template.pieces(self._rounds(template, record, sizes))
        except UserError:
            return None
        text = "".join(piece.text for piece in pieces)
        doubtful = (image is not None and image in text) or SURROGATE.search(text)
        return None if doubtful or not _surely_supervised(pieces, special) else text.split(IMAGE_MARKER)

    def _template(self, record: Record) -> Template:
        return template_for(record, self.template).with_system(record.system)

    def _rounds(self, template: Template, record: Record, sizes: Sequence[Size]) -> list[Round]:
        rounds = template.rounds(record.turns)
        if record.system is not None and IMAGE_MARKER in record.system:
            raise Unfit("image_markers", f"the system prompt has an {IMAGE_MARKER} marker; show pictures in a question")
        if len(sizes) != (wanted := sum(turn.text.count(IMAGE_MARKER) for turn in record.turns)):
            raise UserError(f"{wanted} {IMAGE_MARKER} marker(s) but {len(sizes)} image(s)")
        if self._controls is not None:
            texts = [turn.text for turn in record.turns] + ([] if record.system is None else [record.system])
            texts += [text for question, answer, _ in rounds for text in (question, answer or "")]  # images moved
            for text in dict.fromkeys(texts):
                if found := self._controls.search(text):
                    reason = (
                        f"its text has {found[0]!r} written out, which the tokenizer takes for a command: spell it "
                        "otherwise, or leave the record out"
                    )
                    image = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
                    raise Unfit("image_token" if found[0] == image else "control_token", reason)
        return rounds

    @cached_property
    def _controls(self) -> re.Pattern[str] | None:
        """What only the template may write."""
        return control_tokens(self.tokenizer)

    def _encode(self, record: Record, sizes: Sequence[Size]) -> Expanded:
        template = self._template(record)
        by_round = template.pieces_by_round(self._rounds(template, record, sizes))
        whole = encode_pieces([piece for pieces in by_round for piece in pieces], self.tokenizer)
        if self.truncation == "tokens":
            return self._expand(whole, sizes, self.max_length)
        expanded = self._expand(whole, sizes)
        if _supervised(expanded) and not self._fits(expanded[0]):
            expanded = self._first_rounds(by_round, sizes, whole)
        if not _supervised(expanded):
            raise Unfit("no_supervised_token", NOTHING_TO_LEARN)
        return expanded

    def _first_rounds(self, by_round: list[list[Piece]], sizes: Sequence[Size], whole: Encoded) -> Expanded:
        """As many rounds as fit, tokenised by themselves.

        ``whole`` tells how many that should be: up to a token that joins letters across the end of a round, the first
        rounds have the tokens that start in them. So hardly more than two of the possible cuts are ever tokenised.
        """

        def keep(count: int) -> Expanded:
            pieces = [piece for pieces in by_round[:count] for piece in pieces]
            return self._expand(encode_pieces(pieces, self.tokenizer), sizes)

        answered = [any(piece.is_target for piece in pieces) for pieces in by_round].index(True) + 1
        slots = [place for place, token in enumerate(whole.ids) if token == IMAGE_SLOT]
        extra = [0, *accumulate(self.geometry.num_tokens(size) - 1 for size in sizes)]
        tokens = []
        for end in accumulate(sum(len(piece.text) for piece in pieces) for pieces in by_round):
            before = bisect_left(whole.firsts, end)
            tokens.append(before + extra[bisect_left(slots, before)])

        assert self.max_length is not None
        count = max(bisect_right(tokens, self.max_length), answered)
        kept = keep(count)
        while count > answered and not self._fits(kept[0]):
            count -= 1
            kept = keep(count)
        if not self._fits(kept[0]):
            ids, _, spans = kept
            raise Unfit(
                "too_long",
                f"up to the end of its first answer it has {len(ids)} tokens ({sum(b - a for a, b in spans)} of them "
                f"for {len(spans)} image(s)), more than the limit of {self.max_length}; raise the limit or shorten the "
                "record",
            )
        while count + 1 < len(by_round) and self._fits((more := keep(count + 1))[0]):
            count, kept = count + 1, more
        return kept

    def _expand(self, encoded: Encoded, sizes: Sequence[Size], max_length: int | None = None) -> Expanded:
        """`expand_slots`; images whose question is not in the text any more are left out."""
        ids, labels, _ = encoded
        own = sizes[: ids.count(IMAGE_SLOT)]
        return expand_slots(ids, labels, own, self.image_token_id, self.geometry, max_length)

    def _fits(self, ids: list[int]) -> bool:
        return self.max_length is None or len(ids) <= self.max_length


@contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Puts the record's name in front of what is wrong with it."""
    try:
        yield
    except UserError as error:
        raise RecordError(record.origin, record.id, str(error), error.kind) from None


def _supervised(expanded: Expanded) -> bool:
    labels = expanded[1]
    return labels.count(IGNORE_INDEX) < len(labels)


def _surely_supervised(pieces: Sequence[Piece], special: Sequence[str]) -> bool:
    """Whether some token must start inside an answer: it holds a special token, or starts right behind an image. (Else
    one long token could cover a short answer and the end of the question.)"""
    before = ""
    for piece in pieces:
        if piece.is_target and (before.endswith(IMAGE_MARKER) or any(token in piece.text for token in special)):
            return True
        before = piece.text
    return False


def _sample(name: str, expanded: Expanded, images: Sequence[ImageInput], in_answer: Sequence[bool] = ()) -> Sample:
    ids, labels, spans = expanded
    return Sample(
        id=name,
        input_ids=torch.tensor(ids, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        images=tuple(images[: len(spans)]),
        image_spans=tuple(spans),
        in_answer=tuple(in_answer[: len(spans)]),
    )
