"""Arguments of ``llava-pdrop show``."""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_pdrop.commands.arguments import a_path, a_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("run", type=a_path, metavar="RUN", help="YAML file or directory of a run, or any other model")
    parser.add_argument("picture", type=a_place, metavar="PICTURE", help="a picture file")
    parser.add_argument("question", metavar="QUESTION", help="what is asked about it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of a config key")
    parser.add_argument(
        "--out", type=a_place, default=Path("survivors.png"), metavar="FILE", help="default: survivors.png"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from llava_pdrop.study.show import show_run

    show_run(args.run, args.picture, args.question, args.out, args.overrides)
