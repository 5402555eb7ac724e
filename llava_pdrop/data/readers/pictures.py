"""Pictures that are not files of their own (`llava_pdrop.types.ImageSource`): members of tar shards, cells of tables,
base64 inside the text of a record.

The first two are a few words (which file, where in it); they open their file only when the picture is wanted, so
records stay small and travel to worker processes without pixels.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from llava_pdrop.errors import UserError

MEDIA_SUFFIXES = {
    "mp4", "m4v", "avi", "mov", "mkv", "webm", "mpg", "mpeg", "wmv", "flv",
    "wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "wma", "pcd", "ply",
}  # fmt: skip
"""Suffixes of films, sounds and clouds of points, which no model here can see or hear."""

URL_SAFE = str.maketrans("-_", "+/")
"""Letters of the base64 of web addresses -> those of plain base64."""


@dataclass(frozen=True)
class FileSlice:
    """``size`` bytes of file ``path`` from ``offset`` on, called ``name`` there: a member of an uncompressed tar."""

    path: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    def open(self, mode: str = "rb") -> BinaryIO:
        """The bytes as a file. Only what is asked for is read, so that a header costs one block."""
        return cast(BinaryIO, io.BufferedReader(_Window(self.path, self.offset, self.size)))


@dataclass(frozen=True)
class TableCell:
    """A picture in row ``row`` of a Hugging Face data set: the ``position``-th of its column ``column``.

    ``table`` is the data set in its ``arrow`` format; it is memory-mapped, so that pickling it copies no pictures.
    """

    path: Path
    row: int
    column: str
    position: int
    table: Any = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.path}[{self.row}].{self.column}[{self.position}]"

    def open(self, mode: str = "rb") -> BinaryIO:
        """The bytes as a file, without copying them."""
        import pyarrow

        picture = pictures_of(self.table[self.row].column(self.column)[0])[self.position]
        if pyarrow.types.is_struct(picture.type):
            picture = picture["bytes"]
        return cast(BinaryIO, pyarrow.BufferReader(picture.as_buffer()))


@dataclass(frozen=True)
class InlinePicture:
    """A picture that stands in its record, as ``base64``. It lives as long as the record does."""

    base64: str = field(repr=False)

    def __str__(self) -> str:
        digest = hashlib.blake2b(self.base64.encode(errors="surrogatepass"), digest_size=6).hexdigest()
        return f"base64 picture {digest} of {len(self.base64):,} characters"

    def open(self, mode: str = "rb") -> BinaryIO:
        """The bytes as a file.

        Raises:
            UserError: not base64.
        """
        letters = "".join(self.base64.split()).translate(URL_SAFE).rstrip("=")
        try:
            return io.BytesIO(base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True))
        except (binascii.Error, ValueError) as error:
            raise UserError(f"not base64: {error}") from None


def pictures_of(cell: Any) -> list[Any]:
    """The pyarrow scalars in a cell of a table that holds one picture, a list of them, or none."""
    if not cell.is_valid:
        return []
    return list(cell.values) if is_list(cell.type) else [cell]


def is_list(type: Any) -> bool:
    """Whether a pyarrow type is one of the list types that `datasets` knows."""
    import pyarrow.types as of

    return of.is_list(type) or of.is_large_list(type) or of.is_fixed_size_list(type)


class MadeFile(io.RawIOBase):
    """A file to read and seek in, whose bytes come from elsewhere. ``size`` None: not known before it is read."""

    def __init__(self, size: int | None) -> None:
        self.size, self.at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        if start is None:
            raise io.UnsupportedOperation("its end is not known before it is read")
        self.at = max(0, start + offset)
        return self.at


class _Window(MadeFile):
    """A stretch of a file that looks like a whole one."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        super().__init__(size)
        self._file, self._offset, self._size = path.open("rb", buffering=0), offset, size

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self.at))
        self._file.seek(self._offset + self.at)
        count = self._file.readinto(memoryview(buffer)[:wanted])
        self.at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
