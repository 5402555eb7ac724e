"""``llava-pdrop convert SRC DST --to llava-hf|llava``: a checkpoint in another layout.

Weights go from file to file, one shard at a time; no model is built. Files are memory-mapped, so only what changes
needs memory: the embedding and the head once in float32, and with ``--dtype`` one output shard (5 GB).

Round trips are bit-exact. The original layout has no rows for ``<image>``, ``<pad>`` and the padding of the vocabulary:
they are cut, and on the way back each becomes the mean of the others, as this command makes them. A checkpoint from the
hub comes back with other spare rows, whose embeddings nothing reads.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from llava_pdrop.commands.arguments import a_path

DTYPES = ("bfloat16", "float16", "float32", "keep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "source",
        type=a_path,
        metavar="SRC",
        help="directory or hub id: llava-hf, original LLaVA, a LoRA run, or adapters of peft",
    )
    parser.add_argument("target", type=a_path, metavar="DST", help="directory to write to")
    parser.add_argument("--to", required=True, choices=("llava-hf", "llava"), help="layout to write")
    parser.add_argument("--base", type=a_path, metavar="MODEL", help="model under a LoRA run or an mm_projector.bin")
    parser.add_argument(
        "--vision-tower", type=a_path, metavar="DIR", help="CLIP tower to use instead of the one SRC names"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="precision to write (default: keep)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in DST")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UserError: ``SRC`` is no whole checkpoint of a supported kind, or ``DST`` is in the way.
    """
    import torch

    from llava_pdrop.checkpoint.convert import convert

    target = Path(args.target)
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    source = convert(args.source, target, args.to, args.base, args.vision_tower, dtype, overwrite=args.overwrite)
    schedule = source.schedule
    drops = "says nothing about dropping" if schedule is None else f"drops after layers {list(schedule.layers)}"
    weights = sum(file.stat().st_size for file in target.glob("*.safetensors")) / 1e9
    lines = [f"{args.source} -> {target} ({args.to}): {len(source.tensors)} tensors, {weights:.3g} GB; {drops}"]
    for line in [*lines, *source.notes]:
        Console().print(line, soft_wrap=True, markup=False, highlight=False)
