"""Data formats. A new one is a function from a path to a sequence of entries, and a row in `READERS`.

An entry is a pair: its *origin*, which error messages name (``file.json[3]``), and an object as
`llava_pdrop.data.entries` describes it: ``conversations`` or ``messages``, optional ``id`` and optional ``image`` (or
``images``): one or a list of file names relative to the image root, or of `llava_pdrop.types.ImageSource`. A plain
list of pairs will do; the readers here return sequences that decode an entry when it is asked for, because a million
decoded ones fill gigabytes in every process.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_pdrop.data.readers.table import read_hf
from llava_pdrop.data.readers.tar import read_webdataset
from llava_pdrop.data.readers.text import read_jsonl, read_llava_json, read_messages
from llava_pdrop.errors import MissingFileError, UserError

Entry = tuple[str, Any]

READERS: dict[str, Callable[[Path], Sequence[Entry]]] = {
    "llava_json": read_llava_json,
    "jsonl": read_jsonl,
    "messages": read_messages,
    "hf": read_hf,
    "webdataset": read_webdataset,
}

SUFFIXES = {".json": "llava_json", ".jsonl": "jsonl", ".parquet": "hf", ".tar": "webdataset"}
"""File suffix -> key of `READERS`, used when no format is named."""

DIRECTORIES = {
    "state.json": "hf", "dataset_dict.json": "hf", "*.parquet": "hf", "*.tar": "webdataset",
    "*.json": "messages", "*.jsonl": "messages",
}  # fmt: skip
"""What lies in a directory -> key of `READERS`, used when no format is named."""


def open_entries(path: Path, format: str | None = None) -> Sequence[Entry]:
    """The entries of a data file or directory, through the reader ``format`` names or the path tells.

    Raises:
        MissingFileError: there is nothing at ``path``.
        UserError: unknown format, or nothing readable in that format; one line that names the file.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: no such data file; check the path")
    if format is None and path.is_dir():
        names = [file.name.lower() for file in path.iterdir()]
        format = next((name for pattern, name in DIRECTORIES.items() if fnmatch.filter(names, pattern)), None)
    elif format is None:
        format = SUFFIXES.get(path.suffix.lower())
    if format not in READERS:
        suffixes = {name: ", ".join(f"*{s}" for s, n in SUFFIXES.items() if n == name) for name in READERS}
        known = ", ".join(name + (f" ({suffixes[name]})" if suffixes[name] else "") for name in READERS)
        what = repr(format) if format else f"of the directory {path.name!r}" if path.is_dir() else repr(path.suffix)
        raise UserError(f"{path}: unknown data format {what}; known are {known}")
    try:
        entries = READERS[format](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read as {format} ({error.strerror or error})") from None
    if not len(entries):
        raise UserError(f"{path}: no records in it: check what wrote it, or name other data")
    return entries
