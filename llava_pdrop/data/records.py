"""Data files -> `Record`, decoded when asked for. Formats stand in `llava_pdrop.data.readers`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from llava_pdrop.data.readers import Entry, open_entries
from llava_pdrop.errors import MissingFileError, RecordError, UserError
from llava_pdrop.types import IMAGE_MARKER, ImageSource, Record, Turn

ROLES: dict[str, Literal["human", "gpt"]] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
"""Speaker names found in LLaVA-style files -> role of a `Turn`."""


@dataclass(frozen=True)
class Part:
    """One data file or directory.

    Attributes:
        entries: of a reader.
        image_root: folder the image names are relative to.
        template: name of the conversation format of its records; None: that of the run.
    """

    path: Path
    entries: Sequence[Entry]
    image_root: Path
    template: str | None = None

    @staticmethod
    def open(
        path: Path, image_root: Path | None = None, format: str | None = None, template: str | None = None
    ) -> Part:
        """Opens a data file.

        Raises:
            MissingFileError: the data file or the image folder does not exist.
            UserError: unknown format, or a file that is not of its format.
        """
        entries = open_entries(path, format)
        root = image_root or (path if path.is_dir() else path.parent)
        if not root.is_dir():
            raise MissingFileError(f"{root}: no such image folder (for {path}); check the image root")
        return Part(path, entries, root, template)

    def entry(self, row: int) -> Entry:
        """Entry ``row``.

        Raises:
            RecordError: the reader cannot make one of it.
        """
        try:
            return self.entries[row]
        except RecordError:
            raise
        except UserError as error:
            raise RecordError(f"{self.path}[{row}]", None, str(error)) from None

    def fingerprint(self) -> str:
        """Changes when the data, or what is said about them, do: names, sizes and times of all files."""
        files = sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        return repr((str(self.path.resolve()), stats, str(self.image_root.resolve()), self.template))


class Records(Sequence[Record]):
    """Records of one or several files in a certain order. A record is parsed when it is asked for; kept of each are the
    two numbers that say where it stands.

    Args:
        rows: (N, 2) int32, part and index in it.
    """

    def __init__(self, parts: Sequence[Part], rows: np.ndarray) -> None:
        self.parts = tuple(parts)
        self.rows = rows

    @staticmethod
    def of(part: Part) -> Records:
        """All records of one part, in their order."""
        rows = np.zeros((len(part.entries), 2), np.int32)
        rows[:, 1] = np.arange(len(rows))
        return Records([part], rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        """Record ``index``.

        Raises:
            RecordError: it is not valid.
        """
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        number, row = self.rows[index].tolist()
        part = self.parts[number]
        origin, entry = part.entry(row)
        return parse_entry(entry, part.image_root, origin, part.template)

    def take(self, indices: np.ndarray) -> Records:
        """These records only, in this order."""
        return Records(self.parts, self.rows[indices])

    def summary(self) -> list[str]:
        """A line per part: how many of its records are here, repeats counted, and what they bring with them."""
        used = np.bincount(self.rows[:, 0], minlength=len(self.parts))
        return [
            f"{part.path}: {count:,} of {len(part.entries):,} records"
            + (f", template {part.template}" if part.template is not None else "")
            for part, count in zip(self.parts, used.tolist())
        ]

    def fingerprint(self) -> str:
        """A hash that changes when the files or the choice of records do."""
        digest = hashlib.sha256(np.ascontiguousarray(self.rows, dtype=np.int32).tobytes())
        for part in self.parts:
            digest.update(part.fingerprint().encode())
        return digest.hexdigest()


def read_records(
    path: str | Path, image_root: str | Path | None = None, format: str | None = None, check: bool = True
) -> Records:
    """All records of one data file.

    Args:
        path: LLaVA entries: ``id``, optional ``image`` (a name or a list of names) and ``conversations``, a list of
            ``{"from": ..., "value": ...}``.
        image_root: folder the image names are relative to; default: the folder of ``path``.
        format: key of `llava_pdrop.data.readers.READERS`; default: by the suffix of ``path``.
        check: go through all records now and look for every image file, so that what is wrong is found at once.
            Without, a bad record is found when it is read (`ConversationDataset.lengths` reads all of them).

    Raises:
        MissingFileError: the data file, the image folder or (with ``check``) an image does not exist.
        UserError: unknown format, a broken file or (with ``check``) an invalid record; names file and record.
    """
    records = Records.of(Part.open(Path(path), None if image_root is None else Path(image_root), format))
    if check:
        _check(records)
    return records


def parse_entry(entry: Any, image_root: Path, origin: str, template: str | None = None) -> Record:
    """One LLaVA entry as a `Record`. Ids may be numbers; an entry without id is called by its origin.

    Raises:
        RecordError: no conversation, an unknown speaker, text that is not a string, or a number of ``<image>`` markers
            that is not the number of images.
    """
    if not isinstance(entry, dict):
        raise RecordError(origin, None, f"expected an object with 'conversations', found {type(entry).__name__}")
    name = origin if entry.get("id") is None else str(entry["id"])
    try:
        turns = _parse_turns(entry.get("conversations"))
        images = _parse_images(named_images(entry), image_root)
        markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
        if markers != len(images):
            raise UserError(
                f"{len(images)} image(s) but {markers} {IMAGE_MARKER} marker(s) in the text; write one marker per "
                "image, where the image is shown"
            )
    except UserError as error:
        raise RecordError(origin, name, str(error)) from None
    return Record(name, turns, images, origin, template)


def _parse_turns(conversations: Any) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise UserError("'conversations' must be a list with at least one turn")
    turns = []
    for number, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f"conversations[{number}]: a turn needs 'from' and a text 'value'")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise UserError(f"conversations[{number}]: unknown speaker {speaker!r}; known are {', '.join(ROLES)}")
        turns.append(Turn(role=ROLES[speaker], text=turn["value"]))
    return tuple(turns)


def named_images(entry: dict[str, Any]) -> list[Any]:
    """What an entry has under ``image`` or ``images``, as a list; null, an empty text or list name nothing."""
    listed = [entry.get(key) for key in ("image", "images")]
    image, images = ([] if value in (None, "") else value if isinstance(value, list) else [value] for value in listed)
    return image or images


def _parse_images(images: list[Any], root: Path) -> tuple[ImageSource, ...]:
    """Names become paths below ``root``; what a reader has made a source already stays."""
    if not all((isinstance(image, str) and image) or hasattr(image, "open") for image in images):
        raise UserError("'image' must be a file name or a list of file names")
    return tuple(root / image if isinstance(image, str) else image for image in images)


def _check(records: Iterable[Record]) -> None:
    """Many records share pictures, and a look at a network file system is slow: every path is looked at once."""
    seen: set[ImageSource] = set()
    for record in records:
        for image in record.images:
            if image not in seen and isinstance(image, Path) and not os.path.isfile(image):
                raise MissingFileError(
                    f"{record.origin} (id {record.id}): image {image} does not exist; check the image root"
                )
            seen.add(image)
