"""JSON (one list of objects) and JSON lines, one file or all of a directory. The text stays in the file, which is
memory-mapped and shared by all processes of a machine; kept per record are two numbers, where it begins and ends."""

from __future__ import annotations

import codecs
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_pdrop.errors import RecordError, UserError, clip

BYTES_AT_A_TIME = 1 << 22
"""Bytes read at a time when a JSON list is taken apart."""

_SPACE = re.compile(r"[ \t\n\r]*")
_LITERAL = 16  # an error so near to the end of what has been read may be a number or a \\u escape cut in two


class TextEntries(Sequence[tuple[str, Any]]):
    """Objects of a text file, parsed when asked for.

    Args:
        starts, stops: where each begins and ends, in bytes.
        origin: how error messages name entry ``n``, e.g. ``"{path}[{n}]"``.
        numbers: ``n`` of every entry, if it is not its index.
    """

    def __init__(
        self, path: Path, starts: np.ndarray, stops: np.ndarray, origin: str, numbers: np.ndarray | None = None
    ) -> None:
        self.path = path
        self._starts, self._stops, self._origin, self._numbers = starts, stops, origin, numbers
        self._text: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        """Raises: RecordError: not valid JSON."""
        if self._text is None:
            with self.path.open("rb") as file:
                self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        number = index if self._numbers is None else self._numbers[index]
        origin = self._origin.format(path=self.path, n=number)
        try:
            return origin, parse_json(self._text[self._starts[index] : self._stops[index]])
        except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8
            raise RecordError(origin, None, f"not valid JSON: {clip(error)}") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_text": None}


class JoinedEntries(Sequence[tuple[str, Any]]):
    """The entries of several files, file after file.

    Attributes:
        files: the files.
    """

    def __init__(self, parts: Sequence[TextEntries]) -> None:
        self.parts = tuple(parts)
        self.files = [part.path for part in parts]
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        """Raises: RecordError: not valid JSON. IndexError: there is no such entry."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part][index - (self._ends[part - 1] if part else 0)]


def parse_json(text: bytes) -> Any:
    """What a piece of JSON holds.

    Raises:
        ValueError: not valid JSON, or an object has a key twice, of which `json` keeps the last without a word.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return made


def read_jsonl(path: Path) -> Sequence[tuple[str, Any]]:
    """Entries of a file with one JSON object per line (empty lines are skipped), with their origin ``file.jsonl:3``, or
    of all such files of a directory."""
    return _read_directory(path, (".jsonl",), "jsonl") if path.is_dir() else _read_lines(path)


def read_llava_json(path: Path) -> Sequence[tuple[str, Any]]:
    """Entries of a JSON list, each with its origin ``file.json[3]``, or of all such files of a directory."""
    return _read_directory(path, (".json",), "llava_json") if path.is_dir() else _read_list(path)


def read_messages(path: Path) -> Sequence[tuple[str, Any]]:
    """Entries of a JSON list or of JSON lines, whichever the file or the files of a directory hold."""
    return _read_directory(path, tuple(BY_SUFFIX), "messages") if path.is_dir() else _reader_of(path)(path)


def _read_directory(path: Path, suffixes: Sequence[str], name: str) -> JoinedEntries:
    """All files with these suffixes in a directory, not below it, in order of their names.

    Raises:
        UserError: there are none, or one is no list of records.
    """
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file())
    if not files:
        wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise UserError(f"{path}: cannot be read as {name}: there is no {wanted} in this directory")
    return JoinedEntries([_reader_of(file)(file) for file in files])


def _reader_of(path: Path) -> Callable[[Path], TextEntries]:
    """By the suffix of a file, or else by how it begins."""
    if reader := BY_SUFFIX.get(path.suffix.lower()):
        return reader
    with path.open("rb") as file:
        return _read_list if file.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" else _read_lines


def _read_lines(path: Path) -> TextEntries:
    starts, stops, numbers, at = [], [], [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
            if line[mark:].strip():
                starts.append(at + mark)
                stops.append(at + len(line))
                numbers.append(number)
            at += len(line)
    return TextEntries(path, np.array(starts), np.array(stops), "{path}:{n}", np.array(numbers))


def _read_list(path: Path) -> TextEntries:
    try:
        bounds = np.fromiter(_list_bounds(path), dtype=np.dtype((np.int64, 2)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return TextEntries(path, bounds[:, 0].copy(), bounds[:, 1].copy(), "{path}[{n}]")


BY_SUFFIX: dict[str, Callable[[Path], TextEntries]] = {".json": _read_list, ".jsonl": _read_lines}


def _list_bounds(path: Path) -> Iterator[tuple[int, int]]:
    """First byte and end of every element of the JSON list in ``path``, reading block by block."""
    parse = json.JSONDecoder().raw_decode
    with path.open("rb") as file:
        text = _Text(file)
        if text.next() != "[":
            raise UserError(_what_else(text.rest()))
        text.skip(1)
        separator = text.next()
        if separator == "]":
            text.skip(1)
        while separator != "]":
            text.next()
            try:
                _, stop = parse(text.buffer, text.at)
            except RecursionError:
                raise UserError(f"not valid JSON: nested too deeply near byte {text.byte}") from None
            except json.JSONDecodeError as error:
                cut = error.pos >= len(text.buffer) - _LITERAL or error.msg.startswith("Unterminated string")
                if cut and text.more():
                    continue
                raise UserError(f"not valid JSON: {error.msg} near byte {text.byte_of(error.pos)}") from None
            start = text.byte
            text.skip(stop - text.at)
            yield start, text.byte
            separator = text.next()
            if separator not in (",", "]"):
                raise UserError(f"not valid JSON: expected ',' or ']' near byte {text.byte}")
            text.skip(1)
        if text.next():
            raise UserError(f"not valid JSON: extra data behind the list, near byte {text.byte}")


def _what_else(content: str) -> str:
    """What is wrong with a file that does not begin with a list."""
    try:
        return f"expected a JSON list of records, found {type(json.loads(content)).__name__}"
    except json.JSONDecodeError as error:
        hint = "; if it has one object per line, its format is jsonl" if error.msg == "Extra data" else ""
        return f"not valid JSON: {error}{hint}"


class _Text:
    """A file as text, a block at a time: ``buffer`` what is at hand, ``at`` the place in it, ``byte`` that place in the
    file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self.buffer, self.at, self.byte = "", 0, 0
        self.more()
        if self.buffer.startswith("\ufeff"):
            self.skip(1)

    def more(self) -> bool:
        """Reads another block behind what is not yet used; False at the end of the file."""
        block = self._file.read(BYTES_AT_A_TIME)
        try:
            self.buffer = self.buffer[self.at :] + self._decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(f"not valid UTF-8: {error}") from None
        self.at = 0
        return bool(block)

    def byte_of(self, place: int) -> int:
        """The place in the file of ``buffer[place]``."""
        ahead = self.buffer[self.at : place]
        return self.byte + (len(ahead) if ahead.isascii() else len(ahead.encode()))

    def skip(self, count: int) -> None:
        self.byte = self.byte_of(self.at + count)
        self.at += count

    def next(self) -> str:
        """The next character that is no white space, which becomes the place; empty at the end of the file."""
        while True:
            stop = _SPACE.match(self.buffer, self.at).end()  # type: ignore[union-attr]
            self.skip(stop - self.at)
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def rest(self) -> str:
        while self.more():
            pass
        return self.buffer[self.at :]
