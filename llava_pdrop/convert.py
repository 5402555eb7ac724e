"""``llava-pdrop convert SRC DST --to llava-hf|llava``: a checkpoint in another layout.

Weights go from file to file, one shard at a time, and no model is built. Files are mapped, so that what is needed in
memory is what changes: the embedding and the head once in float32, and with ``--dtype`` one output shard (5 GB).

Round trips are bit-exact. The original layout has no rows for ``<image>``, ``<pad>`` and the padding of the vocabulary:
they are cut, and on the way back each is the mean of the others. That is what they were where this command made them; a
checkpoint of the hub comes back with other spare rows, whose embeddings nothing reads.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError

from llava_pdrop.model.export import save_llava_hf, save_original
from llava_pdrop.model.lora import is_lora
from llava_pdrop.model.shards import read_json, resolve
from llava_pdrop.model.sources import Source, open_llava

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "keep": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("source", metavar="SRC", help="directory or hub id: llava-hf, original LLaVA, or a LoRA run")
    parser.add_argument("target", metavar="DST", help="directory to write")
    parser.add_argument("--to", required=True, choices=("llava-hf", "llava"), help="layout to write")
    parser.add_argument("--base", metavar="LLM", help="model under a LoRA run or an mm_projector.bin")
    parser.add_argument("--vision-tower", metavar="DIR", help="CLIP tower instead of the one that SRC names")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="keep", help="precision to write (default: keep)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        ValueError: ``SRC`` is no whole checkpoint of a supported kind, or ``DST`` is in the way.
    """
    target = Path(args.target)
    source = convert(
        args.source, target, args.to, args.base, args.vision_tower, DTYPES[args.dtype], overwrite=args.overwrite
    )
    schedule = source.schedule
    drops = "says nothing about dropping" if schedule is None else f"drops after layers {list(schedule.layers)}"
    weights = sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1e9
    Console().print(
        f"{args.source} -> {target} ({args.to}): {len(source.tensors)} tensors, {weights:.3g} GB; {drops}",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def convert(
    origin: str,
    target: Path,
    layout: str,
    base: str | None = None,
    vision_tower: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Source:
    """Writes the checkpoint ``origin`` to ``target`` in ``layout``, beside it first and renamed when it is whole.

    Args:
        layout: ``llava-hf`` or ``llava``.
        base: the model under a LoRA run or a projector.
        vision_tower: the CLIP tower of an original checkpoint or under a LoRA run; for a llava-hf one the name the
            original layout gets.
        dtype: precision of all weights; None: as they are stored.

    Raises:
        ValueError: a checkpoint that is not whole or not supported, a ``target`` that may not be replaced, a full disk.
    """
    directory = resolve(origin)
    takes_tower = "mm_vision_tower" in read_json(directory / "config.json") or is_lora(directory)
    if vision_tower is not None and not takes_tower and layout == "llava-hf":
        raise ValueError(f"{origin}: has its own vision tower: --vision-tower is for the original layout and LoRA runs")
    check_target(Path(origin), target, overwrite)
    source = open_llava(origin, base, vision_tower if takes_tower else None)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        if layout == "llava-hf":
            save_llava_hf(source, partial, dtype)
            open_llava(str(partial))
        else:
            save_original(source, partial, dtype, vision_tower)
        _put(partial, target)
    except SafetensorError as error:  # of writing: what cannot be read, `shards` says
        raise ValueError(f"{target} could not be written, and nothing of it is kept: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return source


def check_target(origin: Path, target: Path, overwrite: bool) -> None:
    """Raises `ValueError` unless ``target`` may be written: it is not there, or a checkpoint to be replaced."""
    inside = origin.resolve().is_relative_to(target.resolve()) or target.resolve().is_relative_to(origin.resolve())
    if inside:
        raise ValueError(f"{target}: source and target must not lie in each other")
    if above := next((parent for parent in target.parents if parent.exists() and not parent.is_dir()), None):
        raise ValueError(f"{target}: {above} is a file: give another directory")
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"{target}: exists already: give another directory, or --overwrite")
    if not (target / "config.json").is_file():
        raise ValueError(f"{target}: is no checkpoint (no config.json in it), so that --overwrite does not remove it")


def _put(partial: Path, target: Path) -> None:
    """Renames ``partial`` to ``target``; what was there goes only after that has worked."""
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)
