"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_pdrop.config.places import expanded
from llava_pdrop.errors import Problem


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


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG and its overrides."""
    parser.add_argument("config", type=a_path, metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of a config key")
