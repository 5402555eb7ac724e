"""``llava-pdrop train``."""

from __future__ import annotations

import argparse

from llava_pdrop.commands.arguments import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_config(parser)


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from llava_pdrop.config.load import load_config

    config = load_config(args.config, args.overrides)
    from llava_pdrop.eval.evaluate import check_scorer
    from llava_pdrop.train.run import train

    check_scorer(config)  # training does not need it, but what comes after does
    train(config)
