"""``llava-pdrop compare``."""

from __future__ import annotations

import argparse

from llava_pdrop.commands.arguments import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_config(parser)
    parser.description = (
        f"{parser.description}. With run directories instead (RUN RUN ...): compare finished runs with each other and "
    )
    parser.description += "with what the paper reports, in checkpoints/runs.md and runs.png."


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    if args.config.is_dir():
        from llava_pdrop.compare.runs import compare_runs

        compare_runs([args.config, *args.overrides])
        return
    from llava_pdrop.config.load import load_config
    from llava_pdrop.config.paths import check_paths

    config = load_config(args.config, args.overrides)
    check_paths(config)  # before the imports of training: a missing path is then reported within seconds
    from llava_pdrop.compare.compare import compare

    compare(config)
