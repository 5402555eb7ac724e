"""Arguments of ``llava-pdrop plan``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file, or the directory of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--average-tokens",
        type=float,
        metavar="N",
        help="solve for the ratios that leave N image tokens of a full picture, averaged over the layers",
    )
    budget.add_argument(
        "--tflops", type=float, metavar="X", help="solve for the ratios that cost X TFLOP as the paper counts"
    )
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="over how many GPUs ZeRO shards (default: 8)")
    parser.add_argument(
        "--memory-budget", type=float, default=80.0, metavar="GIB", help="memory of one GPU in GiB (default: 80)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from llava_pdrop.bench.plan import solve
    from llava_pdrop.bench.plan_report import make_report, show, to_json
    from llava_pdrop.config import RUN_FILE, load_config

    if not args.memory_budget > 0:
        raise ValueError(f"--memory-budget must be more than 0 GiB, got {args.memory_budget:g}")
    path = Path(args.config)
    config = load_config(path / RUN_FILE if path.is_dir() else path, args.overrides)
    solution = None
    if args.average_tokens is not None or args.tflops is not None:
        solution = solve(config, args.average_tokens, args.tflops)
        config = replace(config, pyramid_drop=solution.schedule)
    report = make_report(config, args.gpus, args.memory_budget, solution)
    if args.json:
        print(json.dumps(to_json(config, report), indent=2))
    else:
        show(config, report)
