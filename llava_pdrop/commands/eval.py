"""``llava-pdrop eval``.

Exit status: 0; 1 more pictures of a benchmark than ``eval.max_unread`` cannot be read; 2 a user's error.
"""

from __future__ import annotations

import argparse

from llava_pdrop.commands.arguments import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_config(parser)
    parser.description = (
        f"{parser.description}. CONFIG may be a run directory, or any vision-language model that attach() knows, with "
        "data.eval=FILE or benchmarks=NAME,NAME (`llava-pdrop benchmarks` lists them; benchmarks=paper: the paper's). "
        "training_free=NAME,NAME adds schedules to the table: vanilla, or names in compare.training_free."
    )


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        SystemExit: with status 1, after all is written, where too many pictures cannot be read.
    """
    from llava_pdrop.errors import ConfigError
    from llava_pdrop.eval.evaluate import evaluate_config
    from llava_pdrop.eval.measure import measure_config
    from llava_pdrop.eval.score_table import refuse_unread
    from llava_pdrop.eval.subject import subject_config

    config = subject_config(args.config, args.overrides)
    if not config.eval.benchmarks:
        if config.eval.training_free:
            raise ConfigError(f"{config.file}: eval.training_free: is for benchmarks: add benchmarks=NAME,NAME")
        evaluate_config(config)
        return
    if any(word.startswith("data.eval=") for word in args.overrides):
        evaluate_config(config)
    refuse_unread(measure_config(config), config.eval.max_unread)
