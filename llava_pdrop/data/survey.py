"""One pass over all records before training: which are usable, how large their pictures are, how many tokens they make.
`Blocks` is the pass itself, which ``llava-pdrop doctor`` takes too; `survey` is what training makes of it.

The pass reads text and image headers, never pixels. It runs in several processes, looks at the pictures of a block with
several threads (on a network disk the wait for headers is most of the time), and leaves its results in a cache, which
is valid as long as data files, image folder, tokenizer, templates, geometry and the code that counts are the same. (A
picture replaced by one of another size is not noticed; the batch plan then counts its tokens wrongly, nothing else.)
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_pdrop.data.images import image_size
from llava_pdrop.data.records import Records
from llava_pdrop.data.tokens import Unlabelled
from llava_pdrop.errors import RecordError, Unfit, UserError, clip, line_of
from llava_pdrop.files import replacing, write_lines
from llava_pdrop.geometry import Size
from llava_pdrop.types import ImageSource, Record
from llava_pdrop.world import is_first

RECORDS_AT_A_TIME = 512
"""Records that one process takes at a time."""

THREADS = 8
"""Threads of a process that wait for pictures."""

T = TypeVar("T")

log = logging.getLogger(__name__)

LARGE = 10_000
"""From so many records on there are several processes, a progress bar and a cache file; fewer are done in seconds."""

Measure = Callable[[Sequence[Record], Sequence[Sequence[Size]]], list["int | RecordError"]]
"""(records, sizes of their pictures) -> number of tokens of each (`Unlabelled` where none is trained on), or why it
cannot be used."""

UNUSABLE = -1

LISTED = 10
"""Keys that nobody reads which are named."""


@dataclass(frozen=True)
class Survey:
    """What a pass found: ``lengths`` (N,) int32, tokens of every record or `UNUSABLE`, and for each of these the
    reason, by index. ``images`` (N,) int32: pictures of every usable record. ``unlabelled``: usable records of which no
    token is trained on. ``unknown_keys``: key that nobody reads -> usable records that have it."""

    lengths: np.ndarray
    problems: dict[int, RecordError]
    images: np.ndarray
    unlabelled: np.ndarray
    unknown_keys: Counter[str] = field(default_factory=Counter)

    def of(self, indices: np.ndarray) -> Survey:
        """What it found about these usable records only; of keys, about all."""
        unlabelled = np.flatnonzero(np.isin(indices, self.unlabelled))
        return Survey(self.lengths[indices], {}, self.images[indices], unlabelled, self.unknown_keys)

    def unread(self) -> str | None:
        """One line on the keys that nobody reads, None where there are none."""
        if not self.unknown_keys:
            return None
        first = [f"'{clip(key, 60)}' ({count:,} records)" for key, count in self.unknown_keys.most_common(LISTED)]
        more = f" and {len(self.unknown_keys) - LISTED:,} more" if len(self.unknown_keys) > LISTED else ""
        return f"keys of the records that mean nothing here and are not read: {', '.join(first)}{more}"

    def first_problem(self) -> str:
        """One line on the first unusable record, how many there are, and what can be done."""
        first, count = self.problems[min(self.problems)], len(self.problems)
        return (
            f"{first} ({count:,} of {len(self.lengths):,} records cannot be used: llava-pdrop doctor lists them, "
            "data.on_invalid=skip leaves them out)"
        )

    def write_report(self, path: Path) -> None:
        """Writes the unusable records as JSON lines: ``index``, ``origin``, ``id``, ``reason``."""
        found = sorted(self.problems.items())
        write_lines(path, ({"index": i, "origin": p.origin, "id": p.id, "reason": p.reason} for i, p in found))


def may_be_left_out(unusable: int, records: int, most: float) -> bool:
    """Whether so many of all ``records`` are no larger share than ``most`` (``data.max_invalid``)."""
    return unusable <= most * records


@dataclass(frozen=True)
class ImageSizes:
    """(width, height) of all pictures: those of record i are ``sizes[ends[i - 1] : ends[i]]``; a record whose pictures
    could not be read has none, and is read again the next time."""

    ends: np.ndarray
    sizes: np.ndarray

    def of(self, index: int) -> list[Size]:
        first = self.ends[index - 1] if index else 0
        return [(width, height) for width, height in self.sizes[first : self.ends[index]].tolist()]


def survey(
    records: Records | Sequence[Record], measure: Measure, rules: str = "", workers: int = 0, cache: Path | None = None
) -> Survey:
    """Goes through ``records``.

    Args:
        rules: stands for everything ``measure`` depends on; part of the name of the cache file.
        workers: processes for a large data set; 0: this one.
        cache: directory for results, made if missing; None: nothing is kept. Used for `Records` only.
    """
    found = Survey(np.full(len(records), UNUSABLE, np.int32), {}, np.zeros(len(records), np.int32), np.empty(0, int))
    known: ImageSizes | None = None
    files: tuple[Path, Path] | None = None
    if cache is not None and isinstance(records, Records) and len(records) >= LARGE:
        data = records.fingerprint()
        files = cache / f"sizes-{_digest(data)}.npz", cache / f"lengths-{_digest(data, rules)}.npz"
        known, found = _load(files, found)
    todo, unlabelled = np.flatnonzero(found.lengths == UNUSABLE), found.unlabelled.tolist()
    seen: dict[int, list[Size]] = {}
    blocks = Blocks(records, sized, partial(_counted, measure), todo, known)
    quiet = len(todo) < LARGE or not is_first()
    with tqdm(total=len(todo), desc="counting tokens", unit=" records", unit_scale=True, disable=quiet) as bar:
        for results in blocks.spread(workers if len(todo) >= LARGE else 0):
            for index, result, sizes, unread in results:
                seen[index] = sizes
                if isinstance(result, RecordError):
                    found.problems[index] = result
                    continue
                found.lengths[index] = result
                found.unknown_keys.update(unread)
                if isinstance(result, Unlabelled):
                    unlabelled.append(index)
            bar.update(len(results))
    found = replace(found, unlabelled=np.array(sorted(unlabelled), dtype=np.int64))
    if files is not None and len(todo) > len(found.problems):
        _save(files, found, known, seen)
    if known is not None:
        found.images[:] = np.diff(known.ends, prepend=0)
    for index, sizes in seen.items():
        found.images[index] = len(sizes)
    return found


@dataclass(frozen=True)
class Block:
    """What a pass sees of a stretch of records.

    ``numbers``: of each in the data set. ``records``: each, or why it is none. ``unread``: its keys that nobody reads.
    ``seen``: what a look at each of its pictures gave.
    """

    numbers: list[int]
    records: list[Record | RecordError]
    unread: list[list[str]]
    seen: list[list[Any]]


@dataclass(frozen=True)
class Blocks:
    """A data set's records a block at a time, as training and the doctor go through them.

    Attributes:
        look: at a picture; several threads do it, and a picture that several records of a block show is looked at once.
        judge: makes of a block what the pass is for; goes to other processes, as its result does from there.
        todo: numbers of the records; None: all.
        known: sizes that stand for looks.
    """

    records: Records | Sequence[Record]
    look: Callable[[ImageSource], Any]
    judge: Callable[[Block], Any]
    todo: np.ndarray | None = None
    known: ImageSizes | None = None

    def spread(self, workers: int) -> Iterable[Any]:
        """What was made of all blocks, in order, by so many processes beside this one; 0: by this one."""
        todo = np.arange(len(self.records)) if self.todo is None else self.todo
        return in_processes(self._judged, todo, RECORDS_AT_A_TIME, workers)

    def _judged(self, todo: np.ndarray) -> Any:
        numbers = todo.tolist()
        examined = [self._examined(index) for index in numbers]
        records = [record for record, _ in examined]
        return self.judge(Block(numbers, records, [keys for _, keys in examined], self._seen(numbers, records)))

    def _examined(self, index: int) -> tuple[Record | RecordError, list[str]]:
        return self.records.examined(index) if isinstance(self.records, Records) else (self.records[index], [])

    def _seen(self, numbers: list[int], records: list[Record | RecordError]) -> list[list[Any]]:
        images = [() if isinstance(record, RecordError) else record.images for record in records]
        seen: list[list[Any]] = [self.known.of(index) if self.known is not None else [] for index in numbers]
        unknown = [place for place, own in enumerate(images) if len(seen[place]) != len(own)]
        wanted = list(dict.fromkeys(image for place in unknown for image in images[place]))
        looks = dict(zip(wanted, in_threads(self.look, wanted)))
        for place in unknown:
            seen[place] = [looks[image] for image in images[place]]
        return seen


def _counted(measure: Measure, block: Block) -> list[tuple[int, int | RecordError, list[Size], list[str]]]:
    """For training: of every record its number, its tokens or why it cannot be used, the sizes of its pictures, and
    its keys that nobody reads."""
    results: dict[int, int | RecordError] = {}
    ready: dict[int, Record] = {}
    for place, (record, sizes) in enumerate(zip(block.records, block.seen)):
        unseen = next((size for size in sizes if isinstance(size, Unfit)), None)
        if isinstance(record, RecordError):
            results[place] = record
        elif unseen is not None:
            results[place] = RecordError(record.origin, record.id, str(unseen), unseen.kind)
        else:
            ready[place] = record
    counts = measure(list(ready.values()), [block.seen[place] for place in ready])
    results |= zip(ready, counts, strict=True)
    return [
        (number, results[place], block.seen[place] if place in ready else [], block.unread[place])
        for place, number in enumerate(block.numbers)
    ]


def tried(look: Callable[[ImageSource], T], image: ImageSource) -> T | Unfit:
    """What ``look`` sees of a picture, or why it cannot be used."""
    try:
        return look(image)
    except FileNotFoundError as error:
        return Unfit("missing_image", line_of(error))
    except (UserError, OSError) as error:
        return Unfit("corrupt_image", line_of(error))


def sized(image: ImageSource) -> Size | Unfit:
    """(width, height) of a picture, by its header alone."""
    return tried(image_size, image)


def in_threads(function: Callable[[ImageSource], T], images: Sequence[ImageSource]) -> list[T]:
    """``function`` of every picture, in order. A thread takes a stretch at once, since most calls are short."""
    share = max(1, -(-len(images) // THREADS))
    stretches = [images[start : start + share] for start in range(0, len(images), share)]
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda stretch: [function(image) for image in stretch], stretches)
        return [result for part in parts for result in part]


def in_processes(function: Callable[[np.ndarray], T], todo: np.ndarray, at_a_time: int, workers: int) -> Iterable[T]:
    """``function`` of every stretch of ``at_a_time`` of ``todo``, in order, by so many processes beside this one; 0: by
    this one. It goes to the processes, so it is no lambda."""
    stretches: Any = [todo[start : start + at_a_time] for start in range(0, len(todo), at_a_time)]
    return DataLoader(stretches, batch_size=None, num_workers=workers, collate_fn=function)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _load(files: tuple[Path, Path], nothing: Survey) -> tuple[ImageSizes | None, Survey]:
    """What the cache files hold, as far as they exist."""
    known = None
    if files[0].is_file():
        with np.load(files[0]) as stored:
            known = ImageSizes(stored["ends"], stored["sizes"])
    if not files[1].is_file():
        return known, nothing
    with np.load(files[1]) as stored:
        keys = [key.decode(errors="surrogatepass") for key in stored["keys"].tolist()]
        counts = Counter(dict(zip(keys, stored["counts"].tolist())))
        return known, replace(nothing, lengths=stored["lengths"], unlabelled=stored["unlabelled"], unknown_keys=counts)


def _save(files: tuple[Path, Path], found: Survey, known: ImageSizes | None, seen: dict[int, list[Size]]) -> None:
    """Writes both files, each in one move, so that other processes never see half of one."""
    sizes = [seen[i] if i in seen else known.of(i) if known is not None else [] for i in range(len(found.lengths))]
    flat = [size for picture_sizes in sizes for size in picture_sizes]
    ends = np.cumsum([len(picture_sizes) for picture_sizes in sizes])
    contents: list[dict[str, np.ndarray]] = [
        {"ends": ends, "sizes": np.array(flat, dtype=np.int32).reshape(-1, 2)},
        {
            "lengths": found.lengths,
            "unlabelled": found.unlabelled,
            "keys": np.array([key.encode(errors="surrogatepass") for key in found.unknown_keys], dtype=bytes),
            "counts": np.array(list(found.unknown_keys.values()), dtype=np.int64),
        },
    ]
    try:
        for file, arrays in zip(files, contents):
            with replacing(file) as aside, aside.open("wb") as output:
                np.savez(output, allow_pickle=False, **arrays)
    except OSError as error:  # counted is counted: without the cache it is done again the next time
        directory, reason = files[0].parent, error.strerror or error
        log.warning(
            "%s: token counts are not kept (%s): data.cache names another directory, null none", directory, reason
        )
