"""Arguments of ``llava-pdrop families``."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("--markdown", action="store_true", help="print the table as it stands in the documentation")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from llava_pdrop.generate.families import HEADERS, rows
    from llava_pdrop.report.page import Table

    table = Table(HEADERS, rows(), "Model classes that attach() has been proved on", left=len(HEADERS))
    print(table.markdown(), end="") if args.markdown else table.show()
