"""Arguments of ``llava-pdrop benchmarks``."""

from __future__ import annotations

import argparse

from llava_pdrop.commands.arguments import a_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to list (default: all)")
    parser.add_argument("--root", type=a_path, metavar="DIR", help="where they lie (default: eval.root's default)")
    parser.add_argument("--rules", action="store_true", help="list splits and rules instead of files")


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        UserError: a name that no benchmark has.
    """
    from llava_pdrop.config.schema import EvalSection
    from llava_pdrop.errors import UserError, did_you_mean
    from llava_pdrop.eval.benchmarks import BENCHMARKS
    from llava_pdrop.eval.wanted import FILES, RULES, files, rules
    from llava_pdrop.report.style import print_table

    for name in args.names:
        if name not in BENCHMARKS:
            raise UserError(
                f"unknown benchmark {name!r}: choose among {', '.join(BENCHMARKS)}{did_you_mean(name, BENCHMARKS)}"
            )
    rows = [row for row in BENCHMARKS.values() if not args.names or row.name in args.names]
    if args.rules:
        print_table("How benchmarks are scored", [RULES, *rules(rows)], right=False)
        return
    root = args.root or EvalSection.root
    print_table(f"Files of the benchmarks below {root}", [FILES, *files(rows, root)], right=False)
