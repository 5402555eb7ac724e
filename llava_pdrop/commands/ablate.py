"""Arguments of ``llava-pdrop ablate``."""

from __future__ import annotations

import argparse

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
    from llava_pdrop.compare.rows import table

    rows = plan(ablation)
    table(rows, f"{ablation.name}: by operation count").show()
    if not args.plan:
        ablate(ablation, rows)
