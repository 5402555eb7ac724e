"""Data files -> `Record`, decoded when asked for. Formats stand in `llava_pdrop.data.readers`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

from llava_pdrop.data.entries import parse_entry, unknown_keys
from llava_pdrop.data.readers import Entry, open_entries
from llava_pdrop.errors import MissingFileError, RecordError, UserError, clip
from llava_pdrop.types import ImageSource, Record


@dataclass(frozen=True)
class DataPart:
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
    ) -> DataPart:
        """Opens a data file.

        Raises:
            MissingFileError: the data file or the image folder does not exist.
            UserError: unknown format, or a file that is not of its format.
        """
        entries = open_entries(path, format)
        root = image_root or (path if path.is_dir() else path.parent)
        if not root.is_dir():
            raise MissingFileError(f"{root}: no such image folder (for {path}); check the image root")
        return DataPart(path, entries, root, template)

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

    def files(self) -> list[Path]:
        """The files of the data: one, or what the reader has read of a directory, or all below it."""
        listed = getattr(self.entries, "files", None)
        files = listed or (sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path])
        return [file for file in files if file.is_file()]

    def fingerprint(self) -> str:
        """Changes when the data, or what is said about them, do: names, sizes and times of all files."""
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files()]
        return repr((str(self.path.resolve()), stats, str(self.image_root.resolve()), self.template))


class Records(Sequence[Record]):
    """Records of one or several files in a certain order. A record is parsed when it is asked for; kept of each are the
    two numbers that say where it stands.

    Args:
        rows: (N, 2) int32, part and index in it.
    """

    def __init__(self, parts: Sequence[DataPart], rows: np.ndarray) -> None:
        self.parts = tuple(parts)
        self.rows = rows

    @staticmethod
    def of(part: DataPart) -> Records:
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
        record, _ = self.examined(index)
        if isinstance(record, RecordError):
            raise record
        return record

    def examined(self, index: int) -> tuple[Record | RecordError, list[str]]:
        """Record ``index``, or why it is none, and the keys it has that nobody reads."""
        number, row = self.rows[index].tolist()
        part, unread = self.parts[number], list[str]()
        try:
            origin, entry = part.entry(row)
            unread = unknown_keys(entry)
            return parse_entry(entry, part.image_root, origin, part.template), unread
        except RecordError as error:
            return error, unread

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
        path: entries as `llava_pdrop.data.entries` describes them.
        image_root: folder the image names are relative to; default: the folder of ``path``.
        format: key of `llava_pdrop.data.readers.READERS`; default: by the suffix of ``path``.
        check: go through all records now and look for every image file, so that what is wrong is found at once.
            Without, a bad record is found when it is read (`ConversationDataset.lengths` reads all of them).

    Raises:
        MissingFileError: the data file, the image folder or (with ``check``) an image does not exist.
        UserError: unknown format, a broken file or (with ``check``) an invalid record; names file and record.
    """
    records = Records.of(DataPart.open(Path(path), None if image_root is None else Path(image_root), format))
    seen: set[ImageSource] = set()  # many records share pictures, and a look at a network file system is slow
    for record in records if check else ():
        for image in record.images:
            if image not in seen and isinstance(image, Path) and not os.path.isfile(image):
                raise MissingFileError(
                    f"{record.origin} (id {clip(record.id)}): image {clip(image)} does not exist; check the image root"
                )
            seen.add(image)
    return records
