"""Arguments of ``llava-pdrop families``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--markdown", action="store_true", help="print the table as it stands in the documentation")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from llava_pdrop.generate.families import HEADERS, rows
    from llava_pdrop.report.style import markdown_table, print_table

    if args.markdown:
        print(markdown_table(HEADERS, rows(), right=False), end="")
    else:
        print_table("Model classes that attach() has been proved on", [HEADERS, *rows()], right=False)
