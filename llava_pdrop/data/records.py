"""Data files -> `Record`. A new dataset format is one function and one row in `READERS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from llava_pdrop.types import IMAGE_MARKER, Record, Turn

ROLES: dict[str, Literal["human", "gpt"]] = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
"""Speaker names found in LLaVA-style files -> role of a `Turn`."""

SUFFIXES = {".json": "llava_json", ".jsonl": "jsonl"}
"""File suffix -> key of `READERS`, used when no format is named."""

Entries = Iterator[tuple[str, dict[str, Any]]]


def read_records(
    path: str | Path, image_root: str | Path | None = None, format: str | None = None, check_images: bool = True
) -> list[Record]:
    """All records of one data file, validated.

    Args:
        path: file with LLaVA entries: ``id``, optional ``image`` (a name or a list of names) and ``conversations``, a
            list of ``{"from": ..., "value": ...}``.
        image_root: folder the image names are relative to; default: the folder of ``path``.
        format: key of `READERS`; default: by the suffix of ``path``.
        check_images: look for every image file now, so that a missing one is found before training starts.

    Raises:
        FileNotFoundError: the data file, the image folder or (with ``check_images``) an image does not exist.
        ValueError: unknown format, broken JSON or an invalid entry; the message names file and entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file; check the path")
    format = format or SUFFIXES.get(path.suffix.lower())
    if format not in READERS:
        known = ", ".join(f"{name} (*{suffix})" for suffix, name in SUFFIXES.items())
        raise ValueError(f"{path}: unknown data format {format or repr(path.suffix)}; known are {known}")
    root = path.parent if image_root is None else Path(image_root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such image folder (for {path}); check the image root")
    records = [parse_entry(entry, root, origin) for origin, entry in READERS[format](path)]
    if not records:
        raise ValueError(f"{path}: the file holds no records")
    if check_images:
        _check_images(records)
    return records


def read_llava_json(path: Path) -> Entries:
    """Entries of a JSON list, each with its origin ``file.json[3]``."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a JSON list of records, found {type(entries).__name__}")
    for index, entry in enumerate(entries):
        yield f"{path}[{index}]", entry


def read_jsonl(path: Path) -> Entries:
    """Entries of a file with one JSON object per line (empty lines are skipped), with their origin ``file.jsonl:3``."""
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"{path}:{number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not valid JSON: {error}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not valid UTF-8: {error}") from None


READERS: dict[str, Callable[[Path], Entries]] = {"llava_json": read_llava_json, "jsonl": read_jsonl}


def parse_entry(entry: Any, image_root: Path, origin: str) -> Record:
    """One LLaVA entry as a `Record`. Ids may be numbers; an entry without id is called by its origin.

    Raises:
        ValueError: no conversation, an unknown speaker, text that is not a string, or a number of ``<image>`` markers
            that is not the number of images.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{origin}: expected an object with 'conversations', found {type(entry).__name__}")
    name = entry.get("id")
    name = origin if name is None else str(name)
    where = f"{origin} (id {name})"

    conversations = entry.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(f"{where}: 'conversations' must be a list with at least one turn")
    turns = tuple(_parse_turn(turn, f"{where}: conversations[{i}]") for i, turn in enumerate(conversations))

    images = entry.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise ValueError(f"{where}: 'image' must be a file name or a list of file names")
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers != len(images):
        raise ValueError(
            f"{where}: {len(images)} image(s) but {markers} {IMAGE_MARKER} marker(s) in the text; write one marker per "
            "image, where the image is shown"
        )
    return Record(id=name, turns=turns, images=tuple(image_root / image for image in images), origin=origin)


def _parse_turn(turn: Any, where: str) -> Turn:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ValueError(f"{where}: a turn needs 'from' and a text 'value'")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise ValueError(f"{where}: unknown speaker {speaker!r}; known are {', '.join(ROLES)}")
    return Turn(role=ROLES[speaker], text=turn["value"])


def _check_images(records: list[Record]) -> None:
    """Many records share pictures, and a look at a network file system is slow: every path is looked at once."""
    seen: set[Path] = set()
    for record in records:
        for image in record.images:
            if image in seen:
                continue
            if not image.is_file():
                raise FileNotFoundError(
                    f"{record.origin} (id {record.id}): image {image} does not exist; check the image root"
                )
            seen.add(image)
