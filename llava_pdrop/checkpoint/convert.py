"""A checkpoint in another layout: written beside its target first, renamed when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from llava_pdrop.checkpoint.export import save_llava_hf, save_original
from llava_pdrop.checkpoint.lora import is_lora
from llava_pdrop.checkpoint.open import Source, open_llava
from llava_pdrop.checkpoint.shards import resolve
from llava_pdrop.config.load import runs_in
from llava_pdrop.errors import MissingFileError, UserError
from llava_pdrop.files import read_json


def convert(
    origin: str,
    target: Path,
    layout: str,
    base: str | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    prepare: Callable[[Source], list[str]] | None = None,
) -> Source:
    """Writes the checkpoint ``origin`` to ``target`` in ``layout``, beside it first and renamed when it is whole.

    Args:
        layout: ``llava-hf`` or ``llava``.
        base: the model under a LoRA run or a projector.
        vision_tower: the CLIP tower of an original checkpoint or under a LoRA run; for a llava-hf one the name the
            original layout gets.
        dtype: precision of all weights; None: as they are stored.
        prepare: makes what was opened ready to serve before it is written as ``llava-hf`` (its tokenizer's chat
            template), and returns lines for the user.

    Returns:
        what was written; its ``notes`` are lines for the user.

    Raises:
        UserError: a checkpoint that is not whole or not supported, a ``target`` that may not be replaced, a full disk.
    """
    directory = resolve(origin)
    if not (directory / "config.json").is_file() and not is_lora(directory):
        raise MissingFileError(f"{directory} is no checkpoint, it has no config.json{runs_in(directory)}")
    takes_tower = is_lora(directory) or "mm_vision_tower" in read_json(directory / "config.json")
    if vision_tower is not None and not takes_tower and layout == "llava-hf":
        raise UserError(f"{origin}: has its own vision tower: --vision-tower is for the original layout and LoRA runs")
    check_target(Path(origin), target, overwrite)
    source = open_llava(origin, base, vision_tower if takes_tower else None)
    notes: list[str] = []
    if prepare is not None and layout == "llava-hf":
        notes += prepare(source)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        if layout == "llava-hf":
            save_llava_hf(source, partial, dtype)
            open_llava(str(partial))
        else:
            notes += save_original(source, partial, dtype, vision_tower, home=target)
        _put(partial, target)
    except SafetensorError as error:  # of writing: what cannot be read, `shards` says
        raise UserError(f"{target} could not be written, and nothing of it is kept: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(source, notes=(*source.notes, *notes))


def check_target(origin: Path, target: Path, overwrite: bool) -> None:
    """Raises `UserError` unless ``target`` may be written: it is not there, or a checkpoint to be replaced."""
    inside = origin.resolve().is_relative_to(target.resolve()) or target.resolve().is_relative_to(origin.resolve())
    if inside:
        raise UserError(f"{target}: source and target must not lie in each other")
    if above := next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None):
        raise UserError(f"{target}: {above} is a file: give another directory")
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target}: exists already: give another directory, or --overwrite")
    if not (target / "config.json").is_file():
        raise UserError(f"{target}: is no checkpoint (no config.json in it), so that --overwrite does not remove it")


def _put(partial: Path, target: Path) -> None:
    """Renames ``partial`` to ``target``; what was there goes only after that has worked."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
