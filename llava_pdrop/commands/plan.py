"""Arguments of ``llava-pdrop plan``."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace

from llava_pdrop.commands.arguments import add_config
from llava_pdrop.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    add_config(parser, "YAML file, or the directory of a run")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--average-tokens",
        type=float,
        metavar="N",
        help="solve for ratios that keep N image tokens of a full picture, averaged over the layers",
    )
    budget.add_argument(
        "--tflops", type=float, metavar="X", help="solve for ratios that cost X TFLOP by the paper's formula"
    )
    parser.add_argument(
        "--gpus",
        default="8",
        metavar="N[xGIB]",
        help="number of GPUs to shard over (default: 8); 8x80 (eight GPUs of 80 GiB) also advises how to train there",
    )
    parser.add_argument("--memory-budget", type=float, metavar="GIB", help="memory of one GPU in GiB (default: 80)")
    parser.add_argument(
        "--mfu",
        type=float,
        metavar="X",
        help="MFU, the share of a GPU's peak, that the advice assumes to predict hours (default: 0.4)",
    )
    parser.add_argument(
        "--card", default="H100", metavar="NAME",
        help="GPU whose step time is modelled: H100, H200 or A100 (default: H100)",
    )  # fmt: skip
    parser.add_argument(
        "--kernels", metavar="NAME",
        help="of the element-wise parts in that model of time: eager, one for each operation, or fused (default: as "
        "model.kernels of CONFIG, fused unless it is eager; memory always follows CONFIG)",
    )  # fmt: skip
    parser.add_argument(
        "--global-batch",
        type=int,
        metavar="N",
        help="samples per optimizer step, kept by the advice (default: the config's, on 8 GPUs)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> None:
    """Runs the command."""
    from llava_pdrop.config.load import RUN_FILE, load_config
    from llava_pdrop.cost.plan import solve
    from llava_pdrop.cost.report import make_report, page, to_json
    from llava_pdrop.cost.step_time import card_named
    from llava_pdrop.cost.time_report import plan_time

    card_named(args.card)
    gpus, gib = gpus_of(args.gpus)
    budget = _budget(args, gib)
    config = load_config(args.config / RUN_FILE if args.config.is_dir() else args.config, args.overrides)
    solution = advice = None
    if args.average_tokens is not None or args.tflops is not None:
        solution = solve(config, args.average_tokens, args.tflops)
        config = replace(config, pyramid_drop=solution.schedule)
    if gib is not None:
        from llava_pdrop.cost.advice import MFU, advise

        advice = advise(config, gpus, gib, MFU if args.mfu is None else args.mfu, args.global_batch)
    time = plan_time(config, gpus, args.card, args.kernels)
    report = replace(make_report(config, gpus, budget, solution), advice=advice, time=time)
    if args.json:
        print(json.dumps(to_json(config, report), indent=2))
    else:
        page(config, report).show()


def gpus_of(text: str) -> tuple[int, float | None]:
    """(number, GiB of each or None) of what ``--gpus`` was given: ``8``, or ``8x80``.

    Raises:
        UserError: it is neither, or there is no GPU or no memory.
    """
    match = re.fullmatch(r"(\d+)(?:x(\d+(?:\.\d+)?))?", text)
    if match is None:
        raise UserError(f"--gpus takes a number, or a number and the GiB of each, such as 8 or 8x80, got {text!r}")
    gpus, gib = int(match[1]), None if match[2] is None else float(match[2])
    if gpus < 1:
        raise UserError(f"--gpus {text}: there must be at least 1 GPU, got {gpus}")
    if gib == 0:
        raise UserError(f"--gpus {text}: a GPU must have more than 0 GiB")
    return gpus, gib


def _budget(args: argparse.Namespace, gib: float | None) -> float:
    """GiB of a GPU, said in one of two ways; and whether the options of the advice have one to go with."""
    given = args.memory_budget
    if given is not None and not given > 0:
        raise UserError(f"--memory-budget must be more than 0 GiB, got {given:g}")
    if gib is not None and given not in (None, gib):
        raise UserError(
            f"--gpus {args.gpus} and --memory-budget {given:g} contradict each other: leave one of them out"
        )
    for name in ("mfu", "global_batch"):
        if gib is None and getattr(args, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} belongs to the advice for GPUs of a known size: add --gpus 8x80 or the like")
    if args.mfu is not None and not 0 < args.mfu <= 1:
        raise UserError(f"--mfu must be more than 0 and at most 1, got {args.mfu:g}")
    if args.global_batch is not None and args.global_batch < 1:
        raise UserError(f"--global-batch must be at least 1, got {args.global_batch}")
    return gib or given or 80.0
