"""``llava-pdrop convert SRC DST --to llava-hf|llava``: a checkpoint in another layout.

Weights go from file to file, one shard at a time; no model is built. Files are memory-mapped, so only what changes
needs memory: the embedding and the head once in float32, and with ``--dtype`` one output shard (5 GB).

Round trips are bit-exact. The original layout has no rows for ``<image>``, ``<pad>`` and the padding of the vocabulary:
they are cut, and on the way back each becomes the mean of the others, as this command makes them. A checkpoint from the
hub comes back with other spare rows, whose embeddings nothing reads.

What is written is ready to serve: a llava-hf directory has a chat template that shows pictures, the source's own, else
the one ``--template`` names, else that of the run, else the published models' of this kind; an original one opens in
the original code's environment.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from llava_pdrop.commands.arguments import a_path, a_place

DTYPES = ("bfloat16", "float16", "float32", "keep")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "source",
        type=a_path,
        metavar="SRC",
        help="directory or hub id: llava-hf, original LLaVA, a LoRA run, or adapters of peft",
    )
    parser.add_argument("target", type=a_place, metavar="DST", help="directory to write to")
    parser.add_argument("--to", required=True, choices=("llava-hf", "llava"), help="layout to write")
    parser.add_argument("--base", type=a_path, metavar="MODEL", help="model under a LoRA run or an mm_projector.bin")
    parser.add_argument(
        "--vision-tower", type=a_path, metavar="DIR", help="CLIP tower to use instead of the one SRC names"
    )
    parser.add_argument(
        "--template", metavar="NAME", help="conversation template that a llava-hf target is to be served with, as v1"
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
    from llava_pdrop.errors import UserError
    from llava_pdrop.report.console import say

    if args.template is not None and args.to == "llava":
        raise UserError("--template: the original layout has no place for a chat template: leave it out")
    dtype = None if args.dtype == "keep" else getattr(torch, args.dtype)
    prepare = partial(_made_ready, args.source, args.template)
    source = convert(args.source, args.target, args.to, args.base, args.vision_tower, dtype, args.overwrite, prepare)
    schedule = source.schedule
    drops = "says nothing about dropping" if schedule is None else schedule.told
    weights = sum(file.stat().st_size for file in args.target.glob("*.safetensors")) / 1e9
    say(f"{args.source} -> {args.target} ({args.to}): {len(source.tensors)} tensors, {weights:.3g} GB; {drops}")
    for note in source.notes:
        say(note)


def _made_ready(origin: str, asked: str | None, source: Any) -> list[str]:
    """Makes an opened checkpoint ready to serve; ``asked``: name of the conversation template, if the user gives one.
    Returns lines for the user."""
    from llava_pdrop.checkpoint.export import usual_template
    from llava_pdrop.checkpoint.shards import resolve
    from llava_pdrop.data.chat import give_chat
    from llava_pdrop.errors import UserError

    if source.tokenizer is None:
        if asked is not None:
            raise UserError(f"--template {asked}: {origin} has no tokenizer to write it for: copy its files there")
        return [f"chat template: none, as {origin} has no tokenizer"]
    recorded, usual = template_of_run(resolve(origin)), usual_template(source.config)
    because = "which the run was trained with" if recorded else "that of the published models of this kind"
    return [give_chat(source.tokenizer, source.generation, asked, recorded or usual, because)]


def template_of_run(directory: Path) -> str | None:
    """The conversation template (``model.template``) of the run that is saved in ``directory``; None where none is.

    Raises:
        ConfigError: its config cannot be read.
    """
    from llava_pdrop.config.load import RUN_FILE
    from llava_pdrop.config.values import read_mapping

    if not (directory / RUN_FILE).is_file():
        return None
    model = read_mapping(directory / RUN_FILE).get("model")
    name = model.get("template") if isinstance(model, dict) else None
    return name if isinstance(name, str) else None
