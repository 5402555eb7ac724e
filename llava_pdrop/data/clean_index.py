"""The clean index: which records of a data set can be used, as ``llava-pdrop doctor`` found them (``data.index``)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_pdrop.data.records import DataPart, Records
from llava_pdrop.errors import MissingFileError, UserError
from llava_pdrop.files import write_json

TEXT_FORMATS = (".json", ".jsonl")


@dataclass(frozen=True)
class CleanIndex:
    """The usable records of one data set.

    Attributes:
        data: the path that was checked, for messages only.
        digest: `data_digest` of all its records.
        records: how many there are.
        indices: (n,) int64 of the usable ones, ascending.
    """

    data: str
    digest: str
    records: int
    indices: np.ndarray

    @staticmethod
    def of(data: str, records: Records, indices: np.ndarray) -> CleanIndex:
        """The index that says ``indices`` of ``records`` are usable."""
        return CleanIndex(data, data_digest(records), len(records), indices)

    def write(self, path: Path) -> None:
        """Writes it as JSON, in one move."""
        content = {
            "data": self.data,
            "digest": self.digest,
            "records": self.records,
            "usable": len(self.indices),
            "indices": self.indices.tolist(),
        }
        write_json(path, content, indent=None)

    @staticmethod
    def read(path: Path) -> CleanIndex:
        """Reads what `write` wrote.

        Raises:
            MissingFileError: no such file. UserError: not a clean index.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            indices = np.array(content["indices"], dtype=np.int64)
            index = CleanIndex(str(content["data"]), str(content["digest"]), int(content["records"]), indices)
        except FileNotFoundError:
            raise MissingFileError(f"{path}: no such index; llava-pdrop doctor writes one") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not a clean index of llava-pdrop doctor ({type(error).__name__}: {error})"
            ) from None
        ascending = indices.ndim == 1 and bool(np.all(np.diff(indices) > 0))
        if not ascending or (len(indices) and not 0 <= indices[0] <= indices[-1] < index.records):
            raise UserError(f"{path}: its indices do not grow, or lie outside of its {index.records:,} records")
        return index

    def choose(self, records: Records, name: str) -> Records:
        """The usable ones of ``records``; ``name`` is what messages call this index.

        Raises:
            UserError: the index was made for other data, or nothing is usable.
        """
        if len(records) != self.records or data_digest(records) != self.digest:
            raise UserError(
                f"{name}: made for other data ({self.data}, {self.records:,} records; now there are {len(records):,}), "
                "another seed or another version of the file: run llava-pdrop doctor again, or leave data.index out"
            )
        if not len(self.indices):
            raise UserError(f"{name}: none of the {self.records:,} records can be used")
        return records.take(self.indices)


def data_digest(records: Records) -> str:
    """A hash of the choice of records and of the files they stand in: content of JSON and JSON lines; of containers
    with pictures inside, which are too large to be read for this, names and sizes. Where the files lie, and when they
    were written, does not count, so an index goes with its data to another machine."""
    digest = hashlib.sha256(np.ascontiguousarray(records.rows, dtype=np.int32).tobytes())
    for part in records.parts:
        digest.update(_part_digest(part))
    return digest.hexdigest()


def _part_digest(part: DataPart) -> bytes:
    digest = hashlib.sha256(repr(part.template).encode())
    files = part.files()
    if all(file.suffix.lower() in TEXT_FORMATS for file in files):
        for name in files:
            with name.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
    else:
        home = part.path if part.path.is_dir() else part.path.parent
        sizes = [(file.relative_to(home).as_posix(), file.stat().st_size) for file in files]
        digest.update(repr(sizes).encode())
    return digest.digest()
