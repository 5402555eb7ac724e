"""Pictures that a task of lmms-eval hands out (PIL, decoded at every look) as sources of a record."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from PIL import Image

from llava_pdrop.data.images import upright
from llava_pdrop.data.readers.pictures import MadeFile
from llava_pdrop.errors import UserError, clip


@dataclass(frozen=True)
class TaskPicture:
    """The ``place``-th picture that ``look`` returns. Pixels are not kept: ``size`` (width, height) is what batches are
    made by, and a picture is decoded again when its turn comes. Equal pixels are one picture, as one file is."""

    digest: bytes
    size: tuple[int, int]
    name: str = field(compare=False)
    place: int = field(compare=False)
    look: Callable[[], list[Image.Image]] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    def open(self, mode: str = "rb") -> BinaryIO:
        """An uncompressed file of it. Its header is there without a look at the picture."""
        header = b"P6\n# a picture of a task\n%d %d\n255\n" % self.size
        return cast(BinaryIO, io.BufferedReader(_Lazy(header, lambda: self.look()[self.place].tobytes())))


class Unshown(UserError):
    """A picture of a question cannot be read: the others can be asked without it."""


def pictures_of(name: str, visuals: Callable[[], Any]) -> tuple[TaskPicture, ...]:
    """The pictures of one question.

    Args:
        name: of the question, for error messages.
        visuals: what the task shows of it; called again whenever pixels are wanted.

    Raises:
        Unshown: one cannot be read. UserError: one is no picture.
    """

    def look() -> list[Image.Image]:
        try:
            shown = [*(visuals() or ())]
        except (OSError, SyntaxError) as error:  # PIL's for a picture that it cannot decode
            raise Unshown(f"{name}: its picture cannot be read: {clip(error)}") from None
        for entry in shown:
            if not isinstance(entry, Image.Image):
                kind = type(entry).__name__
                raise UserError(
                    f"{name}: shows {clip(repr(entry), 60)} ({kind}): pictures are answered, no films or sounds"
                )
        try:
            return [upright(entry, name) for entry in shown]  # what a task has decoded may still have to be turned
        except UserError as error:
            raise Unshown(str(error)) from None

    found = []
    for place, image in enumerate(look()):
        digest = hashlib.blake2b(f"{image.size}".encode(), digest_size=16)
        digest.update(image.tobytes())
        found.append(TaskPicture(digest.digest(), image.size, f"{name}, picture {place + 1}", place, look))
    return tuple(found)


class _Lazy(MadeFile):
    """A file of a ``header`` and what ``rest`` returns, which is called when somebody reads beyond the header."""

    def __init__(self, header: bytes, rest: Callable[[], bytes]) -> None:
        super().__init__(size=None)
        self._header, self._rest = header, functools.cache(rest)

    def readinto(self, buffer: Any) -> int:
        start = len(self._header)
        part, offset = (self._header, self.at) if self.at < start else (self._rest(), self.at - start)
        piece = memoryview(part)[offset : offset + len(buffer)]
        memoryview(buffer)[: len(piece)] = piece
        self.at += len(piece)
        return len(piece)
