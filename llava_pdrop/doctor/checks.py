"""What can be wrong with a record, and the checks that find it, block by block (`llava_pdrop.doctor.examine`)."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from llava_pdrop.data.conversation import TEMPLATES, Template
from llava_pdrop.data.entries import parse_entry, unknown_keys
from llava_pdrop.data.labels import SURROGATE
from llava_pdrop.data.records import Records
from llava_pdrop.data.tokens import NOTHING_TO_LEARN, Encoder, Truncation, Unlabelled
from llava_pdrop.doctor.images import THREADS, Look, hash64, in_threads, look
from llava_pdrop.errors import RecordError, UserError, clip
from llava_pdrop.types import Record

BLOCK = 512
"""Records that one process takes at a time."""

UNKNOWN = -1
"""Length of a record whose tokens were not counted."""


@dataclass(frozen=True)
class Kind:
    """A kind of problem. ``refused``: training does not take such a record."""

    summary: str
    refused: bool = True


KINDS: dict[str, Kind] = {
    "format": Kind("not a record"),
    "media": Kind("shows what is no picture (video, audio)"),
    "empty_conversation": Kind("a conversation without turns"),
    "image_markers": Kind("number of <image> markers is not the number of images"),
    "role_order": Kind("turns out of order"),
    "template": Kind("a conversation its template cannot write"),
    "missing_image": Kind("image file missing"),
    "corrupt_image": Kind("image file not readable"),
    "no_supervised_token": Kind("nothing to learn"),
    "no_last_answer": Kind("evaluation only: does not end in an answer, so nothing can be scored"),
    "image_token": Kind("the tokenizer's image token written out in the text"),
    "control_token": Kind("a control token written out in the text"),
    "not_tokenised": Kind("text the tokenizer cannot label"),
    "too_long": Kind("does not fit data.max_length, not even its first answer"),
    "over_budget": Kind("longer than data.tokens_per_batch"),
    "shortened": Kind("longer than data.max_length, shortened by data.truncation", refused=False),
    "duplicate_id": Kind("id of an earlier record", refused=False),
    "duplicate_image": Kind("image with the content of another file", refused=False),
    "non_rgb_image": Kind("image that is not RGB (converted when it is loaded)", refused=False),
}
"""Name in reports -> what it means. Their order is that of the reports."""


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
class Checks:
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
        return [k for k, v in KINDS.items() if v.refused and (k, self.truncation) != ("no_supervised_token", "tokens")]

    @cached_property
    def unlimited(self) -> Encoder:
        """The encoder without its limit."""
        assert self.encoder is not None
        return replace(self.encoder, max_length=None)


class Block(NamedTuple):
    """What was found in n records with m pictures.

    ``ids``: (n,) uint64 hashes, 0 for a record without id. ``lengths``: (n, 2) int32 tokens before and after
    truncation, or `UNKNOWN`. ``places``: (m, 2) int64, record and number of the picture in it. ``names``: (m,) uint64
    hashes of what the pictures are called. ``shapes``: (m, 3) int64 width, height (0 where unknown) and bytes (-1 where
    unreadable). ``keys``: unknown key -> records that have it.
    """

    ids: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    names: np.ndarray
    shapes: np.ndarray
    modes: list[str]
    problems: list[RecordProblem]
    keys: Counter[str]


class Blocks(Dataset[Block]):
    """A data set's records, checked a block at a time: a `torch.utils.data.DataLoader` spreads blocks over processes
    and hands them on in order."""

    def __init__(self, records: Records, checks: Checks) -> None:
        self.records, self.checks = records, checks

    def __len__(self) -> int:
        return -(-len(self.records) // BLOCK)

    def __getitem__(self, number: int) -> Block:
        start = number * BLOCK
        return _Pass(self.checks, start).over(self.records[start : start + BLOCK])


@dataclass
class _Pass:
    """The checks of one block, which starts at record ``start``."""

    checks: Checks
    start: int
    problems: list[RecordProblem] = field(default_factory=list)
    keys: Counter[str] = field(default_factory=Counter)

    def over(self, records: Records) -> Block:
        ids = np.zeros(len(records), np.uint64)
        valid: dict[int, Record] = {}
        refusing = self.checks.refused()
        refused: set[int] = set()
        for place, (number, row) in enumerate(records.rows.tolist()):
            part = records.parts[number]
            try:
                origin, entry = part.entry(row)
            except RecordError as error:
                self._add(place, error.origin, error.id, "format", error.reason)
                continue
            self.keys.update(unknown_keys(entry))
            try:
                record = valid[place] = parse_entry(entry, part.image_root, origin, part.template)
            except RecordError as error:
                self._add(place, error.origin, error.id, error.kind or "format", error.reason)
                continue
            if entry.get("id") is not None:
                ids[place] = hash64(record.id.encode(errors="surrogatepass"))
            if problem := structure(record, self.checks.template):
                self._add(place, record.origin, record.id, *problem)
                if problem[0] in refusing:
                    refused.add(place)
            elif self.checks.scored and record.turns[-1].role != "gpt":
                self._add(place, record.origin, record.id, "no_last_answer", "its last question has no answer")
        looks = self._looks(valid)
        lengths = np.full((len(records), 2), UNKNOWN, np.int32)
        if self.checks.encoder is not None:
            ready = {
                place: record
                for place, record in valid.items()
                if place not in refused and all(looks[str(image)].size for image in record.images)
            }
            self._measure(ready, looks, lengths)
        shown = [
            (self.start + place, n, looks[str(image)], str(image))
            for place, record in valid.items()
            for n, image in enumerate(record.images)
        ]
        self.problems.sort(key=lambda problem: problem.index)
        return Block(
            ids=ids,
            lengths=lengths,
            places=np.array([(index, n) for index, n, _, _ in shown], dtype=np.int64).reshape(-1, 2),
            names=np.array([hash64(name.encode(errors="surrogatepass")) for *_, name in shown], dtype=np.uint64),
            shapes=np.array([(*(seen.size or (0, 0)), seen.bytes) for _, _, seen, _ in shown], np.int64).reshape(-1, 3),
            modes=[seen.mode for _, _, seen, _ in shown],
            problems=self.problems,
            keys=self.keys,
        )

    def _add(self, place: int, origin: str, id: str | None, kind: str, reason: str, file: str | None = None) -> None:
        self.problems.append(RecordProblem(self.start + place, origin, id, kind, reason, file))

    def _looks(self, records: dict[int, Record]) -> dict[str, Look]:
        """A look at every picture, by its name; one that several records of the block show is looked at once."""
        wanted = {str(image): image for record in records.values() for image in record.images}
        with ThreadPoolExecutor(THREADS) as pool:
            seen = in_threads(pool, lambda source: look(source, self.checks.decode), list(wanted.values()))
        looks = dict(zip(wanted, seen))
        for place, record in records.items():
            for name in dict.fromkeys(map(str, record.images)):
                found = looks[name]
                if found.kind is not None:
                    self._add(place, record.origin, record.id, found.kind, found.problem, name)
                elif found.mode != "RGB":
                    self._add(
                        place, record.origin, record.id, "non_rgb_image", f"{clip(name)}: mode {found.mode}", name
                    )
        return looks

    def _measure(self, records: dict[int, Record], looks: dict[str, Look], lengths: np.ndarray) -> None:
        encoder = self.checks.encoder
        assert encoder is not None
        sizes = {p: [looks[str(image)].size or (0, 0) for image in record.images] for p, record in records.items()}
        token = encoder.tokenizer.convert_ids_to_tokens(encoder.image_token_id)
        long: list[int] = []
        full = self.checks.unlimited.lengths(list(records.values()), list(sizes.values()))
        for (place, record), count in zip(records.items(), full, strict=True):
            if isinstance(count, RecordError):
                written = token is not None and any(token in turn.text for turn in record.turns)
                kind = "image_token" if written else count.kind or "not_tokenised"
                self._add(place, record.origin, record.id, kind, count.reason)
                continue
            lengths[place] = count
            if encoder.max_length is not None and count > encoder.max_length:
                long.append(place)
        cut = encoder.lengths([records[place] for place in long], [sizes[place] for place in long])
        for place, count in zip(long, cut, strict=True):
            record = records[place]
            if isinstance(count, RecordError):
                self._add(place, record.origin, record.id, "too_long", count.reason)
                lengths[place, 1] = UNKNOWN
                continue
            change = f"{lengths[place, 0]} tokens, shortened to {count}"
            self._add(place, record.origin, record.id, "shortened", change)
            lengths[place, 1] = count
            if isinstance(count, Unlabelled):
                reason = f"all its answers lie behind the cut at {encoder.max_length} tokens"
                self._add(place, record.origin, record.id, "no_supervised_token", reason)
        budget = self.checks.budget
        for place, record in records.items():
            if budget is not None and lengths[place, 1] > budget:
                reason = f"{lengths[place, 1]} tokens, and a micro-batch holds {budget}"
                self._add(place, record.origin, record.id, "over_budget", reason)


def structure(record: Record, template: Template) -> tuple[str, str] | None:
    """What is wrong with the turns of a record, as (kind, reason); None: nothing. ``template`` is the run's."""
    if record.template is not None:
        template = TEMPLATES[record.template]
    for number, turn in enumerate(record.turns):
        if not turn.text.isascii() and SURROGATE.search(turn.text):
            return "not_tokenised", f"conversations[{number}]: holds half of a surrogate pair, which is no text"
    try:
        template = template.with_system(record.system)
    except UserError as error:
        return "template", str(error)
    try:
        rounds = template.rounds(record.turns)
    except UserError as error:
        roles = [turn.role for turn in record.turns]
        turned = [role == ("human", "gpt")[i % 2] for i, role in enumerate(roles[roles[0] == "gpt" :])]
        in_order = bool(turned) and all(turned)
        return "template" if in_order and template.question_only_images else "role_order", str(error)
    answers = [answer for _, answer, learnt in rounds if answer is not None and learnt]
    if not any(answers) and not (answers and template.empty == "trained"):
        return "no_supervised_token", NOTHING_TO_LEARN
    return None
