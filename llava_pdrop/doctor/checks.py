"""What can be wrong with a record, and the checks that find it in a block of the pass (`llava_pdrop.data.survey`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from llava_pdrop.data.conversation import Template, template_for
from llava_pdrop.data.labels import refuse_halves
from llava_pdrop.data.survey import Block
from llava_pdrop.data.tokens import NOTHING_TO_LEARN, Encoder, Truncation, Unlabelled
from llava_pdrop.doctor.images import hash64
from llava_pdrop.errors import RecordError, Unfit, clip
from llava_pdrop.types import Record

UNKNOWN = -1
"""Length of a record whose tokens were not counted."""


PROBLEM_KINDS = {
    "format": "not a record",
    "media": "shows what is no picture (video, audio)",
    "empty_conversation": "a conversation without turns",
    "image_markers": "number of <image> markers is not the number of images",
    "role_order": "turns out of order",
    "template": "a conversation its template cannot write",
    "missing_image": "image file missing",
    "corrupt_image": "image file not readable",
    "no_supervised_token": "nothing to learn",
    "no_last_answer": "evaluation only: does not end in an answer, so nothing can be scored",
    "image_token": "the tokenizer's image token written out in the text",
    "control_token": "a control token written out in the text",
    "not_tokenised": "text the tokenizer cannot label",
    "too_long": "does not fit data.max_length, not even its first answer",
    "over_budget": "longer than data.tokens_per_batch",
    "shortened": "longer than data.max_length, shortened by data.truncation",
    "duplicate_id": "id of an earlier record",
    "duplicate_image": "image with the content of another file",
    "non_rgb_image": "image that is not RGB (converted when it is loaded)",
}
"""Name in reports -> what it means. Their order is that of the reports."""

TAKEN = ("shortened", "duplicate_id", "duplicate_image", "non_rgb_image")
"""Those with which training takes a record."""


@dataclass(frozen=True)
class RecordProblem:
    """One thing that is wrong. ``index`` counts the records as training does; ``file`` is the image concerned."""

    index: int
    origin: str
    id: str | None
    kind: str
    reason: str
    file: str | None = None


@dataclass(frozen=True)
class RecordChecks:
    """What is looked at.

    Attributes:
        template: format of records that name none.
        encoder: counts tokens; None: they are not counted.
        truncation: as in training.
        decode: read every picture in full, not only its header.
        budget: ``data.tokens_per_batch``, which no sample may exceed.
        scored: the records are those of an evaluation, which asks the last question and needs its answer.
    """

    template: Template
    encoder: Encoder | None = None
    truncation: Truncation = "turns"
    decode: bool = False
    budget: int | None = None
    scored: bool = False

    def refused(self) -> list[str]:
        """The kinds of problem that training refuses; it cuts to the token without asking what is left."""
        taken = (*TAKEN, "no_supervised_token") if self.truncation == "tokens" else TAKEN
        return [kind for kind in PROBLEM_KINDS if kind not in taken]

    @cached_property
    def unlimited(self) -> Encoder:
        """The encoder without its limit."""
        assert self.encoder is not None
        return replace(self.encoder, max_length=None)

    def judge(self, block: Block) -> Found:
        """What is wrong in a block of the pass."""
        return _Judgement(self, block).found()


class Found(NamedTuple):
    """What was found in n records with m pictures.

    ``found``: (n, kinds) bool, whether a record has a problem of each of `PROBLEM_KINDS`. ``ids``: (n,) uint64 hashes,
    0 for a record without id. ``lengths``: (n, 2) int32 tokens before and after truncation, or `UNKNOWN`. ``places``:
    (m, 2) int64, record and number of the picture in it. ``names``: (m,) uint64 hashes of what pictures are called.
    ``shapes``: (m, 3) int64 width, height (0 where unknown) and bytes (-1 where unreadable). ``keys``: unknown key ->
    records that have it.
    """

    found: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    names: np.ndarray
    shapes: np.ndarray
    modes: list[str]
    problems: list[RecordProblem]
    keys: Counter[str]


@dataclass
class _Judgement:
    """The checks of one block."""

    checks: RecordChecks
    block: Block
    problems: list[RecordProblem] = field(default_factory=list)
    valid: dict[int, Record] = field(default_factory=dict)

    def found(self) -> Found:
        block = self.block
        for place, record in enumerate(block.records):
            if isinstance(record, RecordError):
                self._add(place, record, record.kind or "format", record.reason)
            else:
                self.valid[place] = record
                self._check_pictures(place, record)
        lengths = self._lengths()
        shown = [
            (block.numbers[place], n, seen, image)
            for place, record in self.valid.items()
            for n, (image, seen) in enumerate(zip(record.images, block.seen[place]))
        ]
        ids = np.zeros(len(block.numbers), np.uint64)
        for place, record in self.valid.items():
            if record.id != record.origin:
                ids[place] = hash64(record.id)
        found, kinds = np.zeros((len(block.numbers), len(PROBLEM_KINDS)), bool), list(PROBLEM_KINDS)
        for problem in self.problems:
            found[block.numbers.index(problem.index), kinds.index(problem.kind)] = True
        return Found(
            found=found,
            ids=ids,
            lengths=lengths,
            places=np.array([(index, n) for index, n, _, _ in shown], dtype=np.int64).reshape(-1, 2),
            names=np.array([hash64(str(image)) for *_, image in shown], dtype=np.uint64),
            shapes=np.array([(*(seen.size or (0, 0)), seen.bytes) for _, _, seen, _ in shown], np.int64).reshape(-1, 3),
            modes=[seen.mode for _, _, seen, _ in shown],
            problems=sorted(self.problems, key=lambda problem: problem.index),
            keys=Counter(key for keys in block.unread for key in keys),
        )

    def _add(self, place: int, record: Record | RecordError, kind: str, reason: str, file: str | None = None) -> None:
        self.problems.append(RecordProblem(self.block.numbers[place], record.origin, record.id, kind, reason, file))

    def _check_pictures(self, place: int, record: Record) -> None:
        for image, seen in dict(zip(map(str, record.images), self.block.seen[place])).items():
            if seen.kind is not None:
                self._add(place, record, seen.kind, seen.problem, image)
            elif seen.mode != "RGB":
                self._add(place, record, "non_rgb_image", f"{clip(image)}: mode {seen.mode}", image)

    def _lengths(self) -> np.ndarray:
        """(n, 2) as in `Found`. What the turns are good for, the encoder says; where it is not asked, `structure`."""
        checks, block = self.checks, self.block
        lengths = np.full((len(block.numbers), 2), UNKNOWN, np.int32)
        ready: dict[int, Record] = {}
        for place, record in self.valid.items():
            if checks.scored and record.turns[-1].role != "gpt":
                self._add(place, record, "no_last_answer", "its last question has no answer")
            if checks.encoder is not None and all(seen.size for seen in block.seen[place]):
                ready[place] = record
            elif (problem := structure(record, checks.template)) is not None:
                self._add(place, record, *problem)
        if checks.encoder is None:
            return lengths
        long: dict[int, int] = {}
        for place, count in self._counted(checks.unlimited, ready):
            lengths[place] = count
            if isinstance(count, Unlabelled):
                self._add(place, ready[place], "no_supervised_token", NOTHING_TO_LEARN)
            if checks.encoder.max_length is not None and count > checks.encoder.max_length:
                long[place], lengths[place, 1] = count, UNKNOWN
        for place, count in self._counted(checks.encoder, {place: ready[place] for place in long}):
            lengths[place, 1] = count
            self._add(place, ready[place], "shortened", f"{long[place]} tokens, shortened to {count}")
            if isinstance(count, Unlabelled) and not isinstance(long[place], Unlabelled):
                reason = f"all its answers lie behind the cut at {checks.encoder.max_length} tokens"
                self._add(place, ready[place], "no_supervised_token", reason)
        if checks.budget is not None:
            for place in np.flatnonzero(lengths[:, 1] > checks.budget).tolist():
                reason = f"{lengths[place, 1]} tokens, and a micro-batch holds {checks.budget}"
                self._add(place, ready[place], "over_budget", reason)
        return lengths

    def _counted(self, encoder: Encoder, records: dict[int, Record]) -> Iterator[tuple[int, int]]:
        """The tokens of those that the encoder takes; the others are problems."""
        sizes = [[seen.size for seen in self.block.seen[place]] for place in records]
        counts = encoder.lengths(list(records.values()), sizes)
        for (place, record), count in zip(records.items(), counts, strict=True):
            if isinstance(count, RecordError):
                self._add(place, record, count.kind or "not_tokenised", count.reason)
            else:
                yield place, count


def structure(record: Record, template: Template) -> tuple[str, str] | None:
    """What is wrong with the turns of a record, as (kind, reason), so far as no tokenizer is needed to tell; None:
    nothing. ``template`` is the run's."""
    try:
        template = template_for(record, template)
        for turn in record.turns:
            refuse_halves(turn.text)
        rounds = template.with_system(record.system).rounds(record.turns)
    except Unfit as error:
        return error.kind, str(error)
    answers = [answer for _, answer, learnt in rounds if answer is not None and learnt]
    if not any(answers) and not (answers and template.empty == "trained"):
        return "no_supervised_token", NOTHING_TO_LEARN
    return None
