"""Arguments of ``llava-pdrop study``.

Exit status: 0; 1 more pictures than ``eval.max_unread`` cannot be read; 2 a user's error.
"""

from __future__ import annotations

import argparse

from llava_pdrop.commands.arguments import a_place, add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes. (What is not given is as `study.run.study` has it.)"""
    parser.description = (
        f"{parser.description}. CONFIG may be a run directory, or any vision-language model that attach() knows, with "
        "data.eval=FILE or benchmarks=NAME. A second start goes on."
    )
    add_config(parser, "YAML file, or the directory of a model")
    parser.add_argument("--out", type=a_place, metavar="DIR", help="where everything goes (default: study in the run)")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="layers before which tokens are dropped (default: eight)"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="X",
        help="shares of the image tokens that stay (default: 0.5 0.25 0.125 0)",
    )  # fmt: skip
    parser.add_argument("--ranker", metavar="NAME", help="what is compared with random choice (default: the paper's)")
    parser.add_argument(
        "--average-tokens", type=float, nargs="+", metavar="N", dest="budgets",
        help="find the schedules that lose least at N image tokens of a question, averaged over the layers "
        "(default: as many as the paper's schedule keeps)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        SystemExit: with status 1, after all is written, where too many pictures cannot be read.
    """
    from llava_pdrop.eval.score_table import refuse_unread
    from llava_pdrop.eval.subject import subject_config
    from llava_pdrop.study.run import study

    config = subject_config(args.config, args.overrides)
    wanted = {name: getattr(args, name) for name in ("layers", "shares", "ranker", "budgets")}
    given = {name: value for name, value in wanted.items() if value is not None}
    refuse_unread(study(config, args.out, **given), config.eval.max_unread)
