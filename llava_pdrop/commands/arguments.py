"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llava_pdrop.config import presets
from llava_pdrop.config.places import expanded
from llava_pdrop.errors import Problem, UserError

EMBEDDED = Path("checkpoints/tiny/finetune_pdrop/pyramid_drop")
"""The run that needs no data of one's own, below the working directory or the checkout."""

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")


def given(args: argparse.Namespace, settings: type[Any]) -> dict[str, Any]:
    """The fields of a dataclass that a command line gives: what it does not (None) is as the dataclass has it."""
    named = {entry.name: getattr(args, entry.name, None) for entry in fields(settings)}
    return {name: value for name, value in named.items() if value is not None}


def a_path(text: str) -> str:
    """For ``type=`` of an option that names a file or directory: no shell writes ``--out=~/x`` or a quoted one out. A
    hub id stays as it is."""
    try:
        return expanded("the path", text)
    except Problem as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def a_place(text: str) -> Path:
    """As `a_path`, for what wants a `Path`."""
    return Path(a_path(text))


def add_config(parser: argparse.ArgumentParser, what: str = "YAML file") -> None:
    """CONFIG, which may be ``what``, and its overrides."""
    parser.add_argument("config", type=a_place, metavar="CONFIG", help=what)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of a config key")


def add_model(parser: argparse.ArgumentParser) -> None:
    """DIR, which `model_in` reads together with the words behind it."""
    parser.add_argument(
        "model", nargs="?", type=a_path, metavar="DIR",
        help="a run, an original checkpoint or any other model that attach() knows (default: the embedded run)",
    )  # fmt: skip


def add_server(parser: argparse.ArgumentParser, port: int) -> None:
    """Where a server listens, by default at ``port``, and what a picture that is sent may have (`serve.pictures`)."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=port, help=f"0 takes a free one (default: {port})")
    pixels, size = "of a picture (default: 25 million)", "of a picture (default: 10 MiB)"
    parser.add_argument("--most-pixels", type=int, dest="pixels", metavar="N", help=pixels)
    parser.add_argument("--most-bytes", type=int, dest="picture_bytes", metavar="N", help=size)


def model_in(first: str | None, more: Sequence[str]) -> tuple[Path, list[str], list[str]]:
    """The directory of a model, the overrides and the other names in the ``first`` and ``more`` words of a command line
    whose first name is the model; where there is none, it is the embedded run.

    Raises:
        UserError: that is not there, or the first name is a file that is none.
    """
    words = [*([first] if first else []), *more]
    overrides = [word for word in words if OVERRIDE.match(word) and not Path(word).exists()]
    names = [word for word in words if word not in overrides]
    if names:
        model = Path(names[0])
        if model.is_file() and model.suffix.lower() not in (".yaml", ".yml"):
            raise UserError(f"{model}: is no model: name one before the pictures, such as {EMBEDDED}")
        return model, overrides, names[1:]
    for directory in (EMBEDDED, presets.CHECKOUT / EMBEDDED):
        if directory.is_dir():
            return directory, overrides, []
    raise UserError(f"{EMBEDDED}: the embedded run is not there: name a model, or make it: scripts/finetune_pdrop.sh")
