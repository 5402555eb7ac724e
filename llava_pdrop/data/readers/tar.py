"""Tar shards as webdataset lays them out: members of one record stand together and share the name up to its first dot,
``KEY.json`` (a LLaVA object) and ``KEY.jpg``, or ``KEY.0.png``, ``KEY.1.png``, ... for several pictures."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from llava_pdrop.data.readers.pictures import MEDIA_SUFFIXES, FileSlice
from llava_pdrop.data.readers.text import parse_json
from llava_pdrop.errors import RecordError, UserError, clip

PICTURE_SUFFIXES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
"""Suffixes of pictures; members with other suffixes than these, ``json`` and `MEDIA_SUFFIXES` are left alone."""

TOGETHER = "all members of a record must stand together in one tar, text and pictures"

FIRST_DOT = (
    "the key of a record ends at the first dot of a name; rename its members, with no other dot before the suffix"
)

TWICE = "tar -r adds a newer one and keeps the old; write the archive anew, the members of a record side by side"

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")

MEMBER = np.dtype([("offset", np.int64), ("size", np.int64)])


class TarEntries(Sequence[tuple[str, Any]]):
    """Records of tar shards. Kept per record are its key and where its members lie; the text is read when asked for.

    The pictures take the place of what the object says under ``image``, in the order of their numbers. It may say
    nothing; if it names any, as many must be there.
    """

    def __init__(self, shards: list[Path]) -> None:
        import pyarrow

        self.shards = shards
        keys: list[str] = []
        shard_of, texts, ends, pictures, suffixes = [], [], [], [], []
        self._odd: dict[int, Members] = {}
        for number, shard in enumerate(shards):
            before = len(keys)
            for key, text, members, odd in _records(shard):
                if odd:
                    self._odd[len(keys)] = odd
                shard_of.append(number)
                keys.append(key)
                texts.append(text or (0, -1))
                for suffix, offset, size in members:
                    pictures.append((offset, size))
                    suffixes.append(suffix)
                ends.append(len(pictures))
            if len(keys) == before:
                raise UserError(f"{shard}: no records in it: check what wrote it, or take it away")
        self._shard_of = np.array(shard_of, dtype=np.int32)
        self._ends = np.array(ends, dtype=np.int64)
        self._texts, self._pictures = np.array(texts, dtype=MEMBER), np.array(pictures, dtype=MEMBER)
        self._keys = pyarrow.array(keys, pyarrow.string())
        self._suffixes = pyarrow.array(suffixes, pyarrow.string()).dictionary_encode()

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: Any) -> Any:
        """Raises: RecordError: no ``KEY.json``, not valid JSON, another number of pictures than it names, a text that
        only another record can be, or a film or sound."""
        key, shard = self._keys[int(index)].as_py(), self.shards[self._shard_of[index]]
        origin = f"{shard}:{key}"
        for suffix, *place in self._odd.get(int(index), ()):
            name = f"{key}.{suffix}"
            if not suffix.lower().endswith(".json"):
                reason = f"{name} beside it cannot be shown; only pictures can: remove it, or leave the record out"
                raise RecordError(origin, key, reason, "media")
            if self._texts["size"][index] < 0 or _holds_a_record(FileSlice(shard, name, *place)):
                raise RecordError(origin, key, f"{name} is not its text, {key}.json: {FIRST_DOT}")
        if self._texts["size"][index] < 0:
            raise RecordError(origin, key, f"there is no {key}.json beside its pictures; {TOGETHER}")
        with FileSlice(shard, f"{key}.json", *self._texts[index].item()).open() as file:
            text = file.read()
        try:
            entry = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{origin}.json", key, f"not valid JSON: {clip(error)}") from None
        if isinstance(entry, dict):
            first = self._ends[index - 1] if index else 0
            count = int(self._ends[index] - first)
            named = entry.get("image") or entry.get("images") or []
            if named and count != (wanted := len(named) if isinstance(named, list) else 1):
                raise RecordError(
                    f"{origin}.json", key, f"it names {wanted} picture(s) and {count} stand beside it; {TOGETHER}"
                )
            entry["image"] = [
                FileSlice(shard, f"{key}.{self._suffixes[i].as_py()}", *self._pictures[i].item())
                for i in range(first, self._ends[index])
            ]
            entry.pop("images", None)
            entry.setdefault("id", key)
        return origin, entry


def read_webdataset(path: Path) -> TarEntries:
    """Records of one ``.tar`` or of all ``*.tar`` of a directory, in order of their names.

    Raises:
        UserError: no shards, or one that is no (uncompressed) tar, cut short, broken in the middle or without records.
    """
    if not path.is_dir():
        return TarEntries([path])
    files = sorted(path.iterdir())
    if packed := [file.name for file in files if file.name.lower().endswith(COMPRESSED)]:
        raise UserError(f"{path}: {clip(packed[0])} is compressed, and only *.tar is read: unpack it, or take it away")
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    if not shards:
        raise UserError(f"{path}: there is no *.tar in this directory")
    return TarEntries(shards)


Members = list[tuple[str, int, int]]


def _records(shard: Path) -> Iterator[tuple[str, tuple[int, int] | None, Members, Members]]:
    """(key, (offset, size) of its JSON, (suffix, offset, size) of its pictures, and of what else asks for a word: a
    film, a sound, a JSON whose name has a dot too much) of every record of a shard."""
    seen: set[str] = set()
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, group in groupby(_members(tar, shard), key=lambda member: member[0]):
                members = [(suffix, offset, size) for _, suffix, offset, size in group if _is_ours(suffix)]
                text = next(((offset, size) for suffix, offset, size in members if suffix.lower() == "json"), None)
                pictures = [member for member in members if _kind(member[0]) in PICTURE_SUFFIXES]
                odd = [m for m in members if _kind(m[0]) not in PICTURE_SUFFIXES and m[0].lower() != "json"]
                if not members:
                    continue
                own: dict[str, str] = {}
                for suffix, *_ in members:
                    if (place := _place(suffix)) in own:
                        pair = dict.fromkeys(f"{key}.{name}" for name in (own[place].lower(), suffix.lower()))
                        raise UserError(f"{shard}: the member {clip(' or '.join(pair))} stands there twice: {TWICE}")
                    own[place] = suffix
                if posixpath.normpath(key) in seen:
                    raise UserError(f"{shard}: the key {clip(key)} stands there twice, with others between: {TWICE}")
                seen.add(posixpath.normpath(key))
                yield key, text, sorted(pictures, key=_number), odd
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{shard}: cannot be read as an uncompressed tar file ({error})") from None


def _holds_a_record(member: FileSlice) -> bool:
    """Whether it is another record's text, and no note about this one."""
    with member.open() as file:
        try:
            entry = parse_json(file.read())
        except (ValueError, RecursionError):
            return False
    return isinstance(entry, dict) and any(entry.get(key) is not None for key in ("conversations", "messages"))


def _kind(suffix: str) -> str:
    return suffix.lower().rpartition(".")[2]


def _is_ours(suffix: str) -> bool:
    return _kind(suffix) in PICTURE_SUFFIXES or _kind(suffix) in MEDIA_SUFFIXES or _kind(suffix) == "json"


def _place(suffix: str) -> str:
    """What only one member of a record can be: its text, or the picture with a number or name."""
    head, _, kind = suffix.lower().rpartition(".")
    return f"{int(head) if head.isdecimal() else head} picture" if kind in PICTURE_SUFFIXES else suffix.lower()


def _members(tar: tarfile.TarFile, shard: Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, suffix, offset, size) of every file in a tar."""
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # a tar remembers all it has seen
        folder, _, name = member.name.rpartition("/")
        if member.isdir() or name.startswith("._"):  # what macOS adds to every file
            continue
        stem, _, suffix = name.partition(".")
        if _is_ours(suffix):
            problem = _problem(member, stem)
            if problem is not None:
                raise UserError(f"{shard}: the member {clip(member.name)} {problem}")
        if member.isfile():
            yield (f"{folder}/{stem}" if folder else stem), suffix, member.offset_data, member.size
    _check_end(tar)


def _problem(member: tarfile.TarInfo, stem: str) -> str | None:
    """Why a member of a record cannot be read where it stands, which would lose the record without a word."""
    if member.issym() or member.islnk():
        return f"is a link to {clip(member.linkname)}: write the archive anew, with --dereference --hard-dereference"
    if not member.isfile() or member.issparse():
        return "is no ordinary file: write the archive anew, without --sparse"
    if not stem:
        return f"has no key: {FIRST_DOT}"
    try:
        member.name.encode()
    except UnicodeEncodeError:
        return "has a name that is not UTF-8: rename it"
    return None


def _check_end(tar: tarfile.TarFile) -> None:
    """`tarfile` takes a broken header, or the end of a file cut short, for the end of the archive: what is behind it
    would be lost without a word.
    """
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")
    while rest := file.read(tarfile.RECORDSIZE):
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"there are data behind its end at byte {tar.offset}; were several joined?")


def _number(member: tuple[str, int, int]) -> tuple[int, str]:
    """``0.png`` -> 0, so that 10 comes behind 9; a picture without number comes first."""
    head = member[0].partition(".")[0]
    return (int(head) if head.isdecimal() else -1), member[0]
