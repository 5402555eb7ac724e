"""The check of a whole data set before training: one parallel pass, then what only shows when all is seen (duplicates).

Kept per record are a few numbers, of its pictures a few more; texts and pictures stay where they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from llava_pdrop.config.paths import number as number_in
from llava_pdrop.config.paths import part_configs
from llava_pdrop.config.schema import Config
from llava_pdrop.data.conversation import template_of
from llava_pdrop.data.records import Records
from llava_pdrop.data.survey import Blocks, may_be_left_out
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.doctor.checks import PROBLEM_KINDS, UNKNOWN, Found, RecordChecks, RecordProblem
from llava_pdrop.doctor.images import look, same_content
from llava_pdrop.train.fit import beyond_positions, nothing_learnt

LISTED = 1000
"""Problems of one kind that are kept with their words; all are counted."""


@dataclass(frozen=True)
class Pictures:
    """The distinct pictures of a data set, by what they are called.

    ``places``: (m, 2) record and number in it where each is shown first. ``sizes``: (m, 2) width and height, 0 where
    unknown. ``bytes``: (m,) of the file, -1 where unreadable. ``shown``: (m,) how often.
    """

    places: np.ndarray
    sizes: np.ndarray
    bytes: np.ndarray
    modes: list[str]
    shown: np.ndarray

    @staticmethod
    def of(places: np.ndarray, names: np.ndarray, shapes: np.ndarray, modes: list[str]) -> Pictures:
        """The distinct ones of all that are shown, as `Found` describes them."""
        _, first, shown = np.unique(names, return_index=True, return_counts=True)
        order = np.argsort(first)
        first = first[order]
        return Pictures(places[first], shapes[first, :2], shapes[first, 2], [modes[i] for i in first], shown[order])

    @property
    def readable(self) -> np.ndarray:
        """(m,) bool."""
        return self.sizes[:, 0] > 0


@dataclass
class Findings:
    """What the pass found about ``records``, each of which stands in a mixture once.

    Attributes:
        checks: what was looked at.
        which: (N,) for every record of an epoch, its number among ``records``.
        found: (n, kinds) bool, whether a record has a problem of each of `PROBLEM_KINDS`.
        lengths: (n, 2) int32 tokens before and after truncation, or `UNKNOWN`.
        counts: (n,) pictures of every record; ``shown``: (all of these, 2) their (width, height), 0 where unknown.
        problems: of each kind the first ones; a `defaultdict`.
        unknown_keys: key -> records that have it.
        same_images: groups of names of files with the same content, the first ones of ``duplicates`` files.
    """

    records: Records
    checks: RecordChecks
    which: np.ndarray
    found: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    shown: np.ndarray
    pictures: Pictures
    problems: dict[str, list[RecordProblem]]
    unknown_keys: Counter[str]
    duplicates: int = 0
    same_images: list[list[str]] = field(default_factory=list)

    @cached_property
    def usable(self) -> np.ndarray:
        """(n,) bool: training takes the record. Where no tokens were counted, as far as one can tell without."""
        refused = np.isin(list(PROBLEM_KINDS), self.checks.refused())
        return np.asarray(~self.found[:, refused].any(axis=1))

    @property
    def clean(self) -> np.ndarray:
        """Indices of the usable records of an epoch, ascending."""
        return np.flatnonzero(self.usable[self.which])

    def has(self, kind: str) -> np.ndarray:
        """(n,) bool: the record has such a problem. Can be written to."""
        return self.found[:, list(PROBLEM_KINDS).index(kind)]

    def count(self, kind: str) -> int:
        """Records with such a problem."""
        return int(self.has(kind).sum())


def examine(records: Records, checks: RecordChecks, workers: int = 0, listed: int = LISTED) -> Findings:
    """Goes through all ``records`` and all their pictures, on a terminal with a bar.

    Args:
        workers: processes beside this one; 0: this one does all. The result is the same.
        listed: problems of one kind that are kept with their words.
    """
    first, which = _distinct(records.rows)
    distinct = records.take(first)
    blocks: list[Found] = []
    problems: dict[str, list[RecordProblem]] = defaultdict(list)
    keys: Counter[str] = Counter()
    with tqdm(total=len(distinct), desc="checking records", unit=" records", unit_scale=True, disable=None) as bar:
        for block in Blocks(distinct, partial(look, decode=checks.decode), checks.judge).spread(workers):
            for problem in block.problems:
                if len(problems[problem.kind]) < listed:
                    problems[problem.kind].append(problem)
            keys += block.keys
            blocks.append(block._replace(problems=[], keys=Counter()))
            bar.update(len(block.ids))

    def together(name: str) -> np.ndarray:
        return np.concatenate([getattr(block, name) for block in blocks])

    places, shapes = together("places"), together("shapes")
    findings = Findings(
        records=distinct,
        checks=checks,
        which=which,
        found=together("found"),
        lengths=together("lengths"),
        counts=np.bincount(places[:, 0], minlength=len(distinct)),
        shown=shapes[:, :2],
        pictures=Pictures.of(places, together("names"), shapes, [mode for block in blocks for mode in block.modes]),
        problems=problems,
        unknown_keys=keys,
    )
    _mark_duplicate_ids(findings, together("ids"), listed)
    with tqdm(desc="comparing images", unit=" files", unit_scale=True, disable=None) as bar:
        _mark_duplicate_images(findings, workers, listed, bar)
    for kind, found in findings.problems.items():  # so far they count distinct records
        own = [replace(problem, index=int(first[problem.index])) for problem in found]
        findings.problems[kind] = sorted(own, key=lambda problem: problem.index)
    return findings


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each record of an epoch stands first (ascending), and for every one which of those it is."""
    keys = rows[:, 0].astype(np.int64) << 32 | rows[:, 1]
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[which]


def _mark_duplicate_ids(findings: Findings, ids: np.ndarray, listed: int) -> None:
    """Every record whose id an earlier one has."""
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    again = np.flatnonzero((first[which] != np.arange(len(ids))) & (ids != 0))
    findings.has("duplicate_id")[again] = True
    for number in again[:listed].tolist():
        record, earlier = findings.records[number], findings.records[int(first[which[number]])]
        problem = RecordProblem(number, record.origin, record.id, "duplicate_id", f"also the id of {earlier.origin}")
        findings.problems["duplicate_id"].append(problem)


def _mark_duplicate_images(findings: Findings, workers: int, listed: int, bar: Any) -> None:
    """Every record that shows a picture whose content stands in a file met earlier, too."""
    pictures = findings.pictures
    sizes = np.where(pictures.readable, pictures.bytes, UNKNOWN)
    groups = same_content(findings.records, pictures.places, sizes, workers, bar.update)
    for group in groups:
        findings.has("duplicate_image")[pictures.places[group[1:], 0]] = True
        findings.duplicates += len(group) - 1
        if len(findings.problems["duplicate_image"]) >= listed:
            continue
        places = pictures.places[group[: listed + 1]].tolist()
        read = [(number, findings.records[number], place) for number, place in places]
        names = [str(record.images[place]) for _, record, place in read]
        findings.same_images.append(names)
        for (number, record, _), name in zip(read[1:], names[1:]):
            reason = f"{name}: same content as {names[0]}"
            problem = RecordProblem(number, record.origin, record.id, "duplicate_image", reason, name)
            findings.problems["duplicate_image"].append(problem)


def examine_set(
    config: Config, name: str, records: Records, encoder: Encoder | None, decode: bool, workers: int, listed: int
) -> Findings:
    """`examine` of ``data.NAME``. Evaluation never shortens, so its data have no limit, and it needs the answer to the
    last question."""
    budget, scored = config.data.tokens_per_batch, name == "eval"
    if scored and encoder is not None:
        encoder, budget = replace(encoder, max_length=None), None
    checks = RecordChecks(template_of(config), encoder, config.data.truncation, decode, budget, scored)
    return examine(records, checks, workers, listed)


@dataclass(frozen=True)
class TrainingStart:
    """What training would do with ``data.train``. ``nothing_learnt`` and ``beyond_positions``: why it would not start
    though all records can be used."""

    on_invalid: str
    max_invalid: float
    refused_records: int
    refused_share: float
    would_start: bool
    would_use_every_record: bool
    nothing_learnt: str | None
    beyond_positions: str | None


def training_start(config: Config, found: Findings) -> TrainingStart:
    """What training ``config`` would do with its data, asked of what training itself asks (`llava_pdrop.train.fit`). It
    skips what is over the budget of a micro-batch in no case."""
    section, total, used = config.data, len(found.which), found.which[found.clean]
    left_out = total - len(used)
    skips = section.on_invalid == "skip" and may_be_left_out(left_out, total, section.max_invalid)
    skips = skips and len(used) > 0 and not found.count("over_budget")
    unlabelled = found.has("no_supervised_token")
    nothing = beyond = None
    if len(used):
        pictured = np.flatnonzero(found.usable & ~unlabelled & (found.counts > 0)).tolist()
        shown = (found.records[number] for number in pictured)
        nothing = nothing_learnt(config, len(used), int(unlabelled[used].sum()), shown, found.checks.encoder)
    if (language := part_configs(config.model)[0]) is not None:
        text = SimpleNamespace(**language | {"max_position_embeddings": number_in(language, "max_position_embeddings")})
        beyond = beyond_positions(config, text, found.lengths[used, 1], found.records.take(used))
    fits = nothing is None and beyond is None
    return TrainingStart(
        section.on_invalid,
        section.max_invalid,
        left_out,
        left_out / total,
        would_start=fits and (not left_out or skips),
        would_use_every_record=fits and not left_out,
        nothing_learnt=nothing,
        beyond_positions=beyond,
    )


def verdict(training: TrainingStart, found: Mapping[str, Findings], index: Path) -> str:
    """All in one line; ``found`` of ``data.train``, and of ``data.eval`` where it was looked at."""
    train = found["train"]
    known = "" if train.checks.encoder else " (tokens were not counted, so records may still be too long)"
    if (reason := training.nothing_learnt or training.beyond_positions) is not None:
        lines = [f"Training would not start: {reason}."]
    elif training.would_use_every_record:
        lines = [f"Training would start and use every record{known}."]
    else:
        setting = f"data.on_invalid: {training.on_invalid}"
        if training.on_invalid == "skip":
            setting += f", data.max_invalid: {training.max_invalid:g}"
        starts = "would start without them" if training.would_start else "would not start"
        rest = f"; data.index={index} trains on the other {len(train.clean):,}" if len(train.clean) else ""
        lines = [
            f"{training.refused_records:,} of {len(train.which):,} records cannot be used{known}. "
            f"Training ({setting}) {starts}{rest}."
        ]
    if "eval" in found and (left_out := len(found["eval"].which) - len(found["eval"].clean)):
        lines.append(f"{left_out:,} of {len(found['eval'].which):,} records of data.eval cannot be used.")
    return " ".join(lines)
