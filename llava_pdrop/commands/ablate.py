"""Arguments of ``llava-pdrop ablate``."""

from __future__ import annotations

import argparse
import os

from llava_pdrop.commands.arguments import a_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("config", type=a_path, metavar="ABLATION", help="YAML file: a config and its variants")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides for every variant")
    parser.add_argument("--plan", action="store_true", help="check and list the variants; train nothing")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from llava_pdrop.compare.variants import load_ablation

    ablation = load_ablation(args.config, args.overrides)
    from llava_pdrop.compare.ablate import ablate, plan
    from llava_pdrop.compare.ablate_report import show, write
    from llava_pdrop.eval.scores import refuse_unread

    rows = plan(ablation)
    if os.environ.get("RANK", "0") == "0":
        show(ablation, rows, f"{ablation.name}: by operation count")
    if args.plan:
        return
    measured = ablate(ablation, rows)
    if measured is not None:
        show(ablation, measured, ablation.name)
        print(f"report: {write(ablation, measured)}")
        allowed = ablation.variants[0].config.eval.max_unread
        refuse_unread([score for row in measured for score in row.scores], allowed)
