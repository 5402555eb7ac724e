"""What `llava_pdrop.doctor.examine` finds out about pictures: header, file size, and which have the same content."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_pdrop.data.images import image_header, load_image
from llava_pdrop.data.records import Records
from llava_pdrop.data.survey import in_processes, in_threads, tried
from llava_pdrop.errors import QUOTED, Unfit, clip
from llava_pdrop.types import ImageSource

PICTURES_AT_A_TIME = 256
"""Pictures whose content one process compares at a time."""

SAMPLE = 4096
"""Bytes from the middle and from the end of a file that are compared before whole files are."""

READ = 1 << 20


class Look(NamedTuple):
    """What one look at a picture shows.

    ``size``: (width, height) upright, None where ``problem`` says why it cannot be read. ``mode``: PIL's, empty with a
    problem. ``bytes``: of its file, -1 with a problem.
    """

    size: tuple[int, int] | None
    mode: str
    bytes: int
    kind: str | None = None
    problem: str = ""


def look(source: ImageSource, decode: bool = False) -> Look:
    """Reads the header of a picture; with ``decode`` all its pixels too, which finds files that are cut short."""

    def whole(source: ImageSource) -> Look:
        size, mode = image_header(source)
        if decode:
            load_image(source)
        return Look(size, mode, file_bytes(source))

    seen = tried(whole, source)
    return Look(None, "", -1, seen.kind, clip(seen, 2 * QUOTED)) if isinstance(seen, Unfit) else seen


def file_bytes(source: ImageSource) -> int:
    """Size of the file a picture is stored as.

    Raises:
        OSError: there is none.
    """
    if isinstance(source, Path):
        return source.stat().st_size
    with source.open("rb") as file:
        return file.seek(0, io.SEEK_END)


def hash64(text: str) -> int:
    """64 bits that stand for ``text``; of a million texts, two have the same with a chance of 1 in 30 million."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def same_content(
    records: Records, places: np.ndarray, sizes: np.ndarray, workers: int = 0, progress: Callable[[int], Any] = int
) -> list[list[int]]:
    """Groups of pictures whose files have the same bytes.

    Of files of one size a sample is compared, and only those that agree in it are read in full.

    Args:
        places: (N, 2) record and number of the picture in it.
        sizes: (N,) bytes of each file; files of less than one are left alone.
        progress: called with the number of files just read.

    Returns:
        numbers below N, each group ascending.
    """
    todo = np.flatnonzero(sizes > 0)
    keys = sizes[todo].astype(np.uint64)
    for whole in (False, True):
        todo = todo[_repeated(keys)]
        if not len(todo):
            return []
        found = []
        for digests in in_processes(partial(_digests, records, whole), places[todo], PICTURES_AT_A_TIME, workers):
            found.append(digests)
            progress(len(digests))
        keys = np.concatenate(found)
    order = np.argsort(keys, kind="stable")
    edges = np.flatnonzero(np.diff(keys[order])) + 1
    return sorted(group.tolist() for group in np.split(todo[order], edges) if len(group) > 1)


def _repeated(keys: np.ndarray) -> np.ndarray:
    """Places of the keys that occur more than once."""
    _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.flatnonzero(counts[which] > 1)


def _digests(records: Records, whole: bool, places: np.ndarray) -> np.ndarray:
    """A hash of each of some pictures."""
    sources = [records[record].images[place] for record, place in places.tolist()]
    return np.array(in_threads(lambda source: _digest(source, whole), sources), dtype=np.uint64)


def _digest(source: ImageSource, whole: bool) -> int:
    """A hash of a file's size and of all its bytes or of a sample of them."""
    digest = hashlib.blake2b(digest_size=8)
    with source.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        digest.update(size.to_bytes(8, "little"))
        if whole or size <= 2 * SAMPLE:
            file.seek(0)
            while block := file.read(READ):
                digest.update(block)
        else:
            for start in (size // 2, size - SAMPLE):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return int.from_bytes(digest.digest(), "little")
