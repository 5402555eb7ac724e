"""Checkpoints that are whole or are none.

A checkpoint is written aside, in ``OUTPUT_DIR/.partial``, gets a manifest of its files with their sizes and hashes, and
is then renamed to ``OUTPUT_DIR/checkpoint-STEP``: whatever kills the run, what bears that name was complete once. What
happened to it later (a file deleted, a disk that lost the end of one) is found by comparing it with its manifest.

Hashing reads every byte once after writing and once before resuming: sha256 is about 0.6 to 2 GB a second and core, and
`THREADS` files are hashed at a time.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llava_pdrop.errors import UserError
from llava_pdrop.files import read_json, write_json
from llava_pdrop.report.units import GIB

MANIFEST = "manifest.json"
STAGING = ".partial"
THREADS = 8

CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or not be used."""


def commit(staged: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Makes the checkpoint ``target`` of a directory whose files are complete: manifest, flush to the disk, rename.

    Args:
        facts: goes into the manifest beside ``files``.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = list(pool.map(_flushed_hash, files))
    entries = {
        path.relative_to(staged).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes)
    }
    _flush(write_json(staged / MANIFEST, {**facts, "files": entries}))
    replaced = staged.with_name(f"replaced-{target.name}")
    if target.exists():  # torn, or of a run that went another way from an earlier checkpoint
        target.rename(replaced)
    staged.rename(target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, or None where there is none that can be read."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except (OSError, UserError):
        return None
    return manifest if "files" in manifest else None


def what_is_torn(checkpoint: Path, content: bool = True) -> str | None:
    """Why ``checkpoint`` is not whole, None where it is.

    Args:
        content: False compares sizes only, which takes no time.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return f"it has no readable {MANIFEST}, so it was not written to its end"
    entries: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in entries.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size:,} bytes instead of {entry['size']:,}"
    if not content:
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(_hash, [checkpoint / name for name in entries])
        return next((f"{n} has changed" for n, found in zip(entries, hashes) if found != entries[n]["sha256"]), None)


def all_checkpoints(output: Path) -> list[Path]:
    """The checkpoints in ``output``, whole or not, the oldest first."""
    found = output.glob("checkpoint-*") if output.is_dir() else ()
    return sorted((path for path in found if CHECKPOINT_NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer steps made before ``checkpoint``."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else 0


def newest_whole(output: Path, say: Callable[[str], None], content: bool = True) -> Path | None:
    """The newest whole checkpoint in ``output``; every newer one, torn, is named with the reason."""
    for checkpoint in reversed(all_checkpoints(output)):
        reason = what_is_torn(checkpoint, content)
        if reason is None:
            return checkpoint
        say(f"{checkpoint} is torn and passed over: {reason}")
    return None


def rotate(output: Path, limit: int | None) -> None:
    """Removes all checkpoints but the ``limit`` newest whole ones (None or 0: removes none), and what is newer.

    Whether one is whole is decided by the sizes of its files. A torn one is never counted, so the last whole one stays.
    """
    if not limit or limit < 0:
        return
    checkpoints = all_checkpoints(output)
    whole = [path for path in checkpoints if what_is_torn(path, content=False) is None]
    kept = whole[-limit:]
    for path in checkpoints:
        if kept and path not in kept and step_of(path) < step_of(kept[-1]):
            (path / MANIFEST).unlink(missing_ok=True)  # first: what an interruption leaves does not look whole
            shutil.rmtree(path)


def check_space(directory: Path, needed: int, name: str) -> None:
    """Compares ``needed`` bytes with what is free where ``directory`` lies.

    Raises:
        CheckpointError: it is less; the line says how much is needed, free, and still there to resume from.
    """
    free = free_bytes(directory)
    if free < needed:
        raise CheckpointError(f"{directory / name} is not written: {shortage(directory, needed)}")


def shortage(directory: Path, needed: int) -> str:
    """What to say about a disk that is full."""
    last = newest_whole(directory, lambda line: None, content=False)
    kept = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
    return (
        f"it needs at least {needed / GIB:.3f} GiB and {free_bytes(directory) / GIB:.3f} GiB are free; {kept}; make "
        "room (or lower train.save_total_limit) and start the same command again"
    )


def free_bytes(directory: Path) -> int:
    """Bytes this user can still write where ``directory`` lies."""
    return shutil.disk_usage(directory).free


def size_of(checkpoint: Path) -> int:
    """Bytes of a whole checkpoint, by its manifest; 0 where it has none."""
    manifest = read_manifest(checkpoint)
    return sum(entry["size"] for entry in manifest["files"].values()) if manifest else 0


def _flushed_hash(file: Path) -> str:
    _flush(file)
    return _hash(file)


def _hash(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Waits until the disk has what was written to a file, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
