"""Pictures of a request: data URIs, files of one directory, and URLs where those are allowed. Nothing is believed of
them: bytes, pixels and format are looked at before anything is decoded, and no path leaves the directory."""

from __future__ import annotations

import base64
import os
import re
import stat
from dataclasses import dataclass, field
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal
from urllib.parse import unquote

from PIL import Image

from llava_pdrop.data.images import READ_ERRORS
from llava_pdrop.errors import UserError, clip
from llava_pdrop.serve.fetch import fetched

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is decoded: formats whose readers start no other program."""

DATA = re.compile(r"data:image/[a-zA-Z0-9.+-]+;base64,")
SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")


@dataclass(frozen=True)
class Limits:
    """Of what a request may hold.

    Attributes:
        pictures: how many. picture_bytes: of each, as its file has them. pixels: of each, width times height.
        directory: where files may be taken from; None: no files. urls: whether URLs are fetched.
        fetch_seconds: until a URL has to be there.
        body_bytes: of the whole request. body_seconds: until it has to be there.
    """

    pictures: int = 8
    picture_bytes: int = 10 * 2**20
    pixels: int = 25_000_000
    directory: Path | None = None
    urls: bool = False
    fetch_seconds: float = 10.0
    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for option, value in (("pictures", self.pictures), ("pixels", self.pixels), ("bytes", self.picture_bytes)):
            if value < 1:
                raise UserError(f"--most-{option} must be at least 1, got {value}")


@dataclass(frozen=True)
class Picture:
    """An `ImageSource` in memory. Pictures of the same bytes are equal, wherever they come from."""

    digest: bytes
    data: bytes = field(compare=False)
    name: str = field(compare=False)

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """The bytes as a file."""
        return BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


def picture_of(url: str, where: str, limits: Limits) -> Picture:
    """The picture that ``url`` stands for. Fetches it, so that it may take `Limits.fetch_seconds`.

    Args:
        where: its place in the request, for messages.

    Raises:
        UserError: it is none of what is allowed, cannot be had, or is too large; the message does not name ``where``.
    """
    if url[:5].lower() == "data:":
        data = _decoded(url, limits.picture_bytes)
    elif re.match("https?:", url, re.IGNORECASE):
        if not limits.urls:
            raise UserError("URLs are not fetched (the server is started without --allow-urls): give a data URI")
        data = fetched(url, limits.picture_bytes, limits.fetch_seconds)
    elif not SCHEME.match(url) or url[:5].lower() == "file:":
        data = _read(url, limits.directory, limits.picture_bytes)
    else:
        raise UserError(f"a picture is a data URI, a file or an https URL, not {clip(url, 60)!r}")
    return looked_at(data, where, limits)


def looked_at(data: bytes, where: str, limits: Limits) -> Picture:
    """The picture that ``data`` begins like; it is named ``where``.

    Raises:
        UserError: it begins like none of `FORMATS`, or is too large; the message does not name ``where``.
    """
    if len(data) > limits.picture_bytes:
        raise _too_large(limits.picture_bytes)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise UserError(f"the picture has more than {limits.pixels:,} pixels: make it smaller") from None
    except READ_ERRORS:
        raise UserError(f"the bytes are no picture of {', '.join(FORMATS)}") from None
    if width * height > limits.pixels:
        shown = f"{width} x {height} pixels, and at most {limits.pixels:,}"
        raise UserError(f"the picture has {shown} are taken: make it smaller")
    return Picture(blake2b(data, digest_size=16).digest(), data, where)


def _decoded(url: str, most: int) -> bytes:
    found = DATA.match(url)
    if found is None:
        raise UserError("a data URI of a picture begins with data:image/png;base64, (or another image type)")
    text = url[found.end() :]
    if len(text) > (most + 2) // 3 * 4:
        raise _too_large(most)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise UserError(f"the data URI is no base64 ({clip(error, 80)})") from None


def _read(url: str, directory: Path | None, most: int) -> bytes:
    """A file inside of ``directory``, links followed. It is opened part by part and no link is followed then: what was
    looked at is what is read, even if somebody changes the directory in between."""
    if directory is None:
        raise UserError("files are not read (the server is started without --pictures DIR): give a data URI")
    name = unquote(re.sub("^file:(//(localhost)?(?=/))?", "", url, flags=re.IGNORECASE))
    refused = UserError(f"no such file in the pictures of this server: {clip(name, 100)!r}")
    if not name or "\0" in name:
        raise refused
    root = directory.resolve()
    try:
        parts = (root / name).resolve(strict=True).relative_to(root).parts
    except (OSError, ValueError, RuntimeError):
        raise refused from None
    if not parts:
        raise refused
    handles = list[int]()
    try:
        handles.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY))
        for part in parts:
            handles.append(os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handles[-1]))
        found = os.fstat(handles[-1])
        if not stat.S_ISREG(found.st_mode):
            raise refused
        if found.st_size > most:
            raise _too_large(most)
        with os.fdopen(handles.pop(), "rb") as file:
            return file.read(most + 1)  # it may have grown: `looked_at` counts again
    except OSError:
        raise refused from None
    finally:
        for handle in handles:
            os.close(handle)


def _too_large(most: int) -> UserError:
    return UserError(f"the picture has more than {most:,} bytes: make it smaller")
