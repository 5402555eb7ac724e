"""JSON files, and files of which nobody ever sees half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_pdrop.errors import MissingFileError, UserError


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives a path beside ``file`` to write to; what is there at the end becomes ``file`` in one move. A process that
    is killed meanwhile leaves ``file`` as it was, and so does an exception. Directories are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}.partial")  # of this process: another one may write the same
    try:
        yield aside
        os.replace(aside, file)
    finally:
        aside.unlink(missing_ok=True)


def save_text(file: Path, text: str) -> Path:
    """Writes ``text`` in one move (`replacing`); half a character, as in the name of a record, as its escape."""
    with replacing(file) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    return file


def write_json(file: Path, value: Any, indent: int | None = 2) -> Path:
    """Writes ``value``, in which dataclasses are objects and paths are text, as `save_text` does; returns ``file``.
    Without ``indent`` it is one line."""
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False, default=_plain)
    return save_text(file, text + "\n")


def write_lines(file: Path, rows: Iterable[Any]) -> Path:
    """Writes one line of JSON for each of ``rows``, as `save_text` does; returns ``file``."""
    return save_text(file, "".join(json.dumps(row, ensure_ascii=False, default=_plain) + "\n" for row in rows))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else asdict(value)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        MissingFileError: no such file. UserError: it cannot be read, or is no JSON object.
    """
    if not file.is_file():
        raise MissingFileError(f"{file}: no such file")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not a JSON file ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds no JSON object, found {type(value).__name__}")
    return value
