"""``llava-pdrop bench train`` and ``llava-pdrop bench prefill``: their arguments, and what runs them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava_pdrop.bench.inference import OUT, add_prefill_arguments, add_shape_arguments, check_counts, run_prefill

if TYPE_CHECKING:
    from llava_pdrop.model.schedule import Schedule


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes. (No import of torch: this also runs for ``--help``.)"""
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, summary, add in (
        ("train", "a training step, vanilla beside dropping", add_train_arguments),
        ("prefill", "prompt and answer at inference", add_prefill_arguments),
    ):
        own = kinds.add_parser(
            name,
            help=summary,
            description=f"Measures {summary}, with random weights and made-up batches, on one device.",
        )
        add(own)
        own.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )


def run(args: argparse.Namespace) -> None:
    """Runs one bench."""
    {"train": run_train, "prefill": run_prefill}[args.what](args)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``bench train``."""
    add_shape_arguments(parser)
    parser.add_argument(
        "--schedule", nargs="+", type=Path, default=[], metavar="FILE",
        help="YAML with a pyramid_drop section, or a bare schedule, measured beside vanilla (default: as CONFIG or the "
        "shape)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="counted steps of every schedule")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before them")
    parser.add_argument("--samples", type=int, metavar="N", help="of a micro-batch (default: as CONFIG or the shape)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, lengths and pictures")
    parser.add_argument("--images", default="mixture", help="mixture (drawn as in training) or full (every tile used)")
    parser.add_argument("--optimizer", default="auto", help="auto (what fits), adamw, sharded (one of 8) or none")
    parser.add_argument(
        "--recompute", action=argparse.BooleanOptionalAction,
        help="activation checkpointing (default: as CONFIG or the shape)",
    )  # fmt: skip
    parser.add_argument(
        "--attention", metavar="BACKEND", help="auto, sdpa, varlen or flash_attn (default: as CONFIG, else auto)"
    )
    parser.add_argument("--compare", action="store_true", help="also measure every choice against its alternative")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where the three files go")


def run_train(args: argparse.Namespace) -> None:
    """Measures, prints the table, and writes JSON, Markdown and PNG.

    Raises:
        ValueError: an argument that is not possible, a config that cannot be measured, or out of memory.
    """
    check_counts(args, steps=1, warmup=0, samples=1, seed=0)
    from llava_pdrop.bench import training_report, training_tables, variants
    from llava_pdrop.bench.chosen import chosen_shape, file_name
    from llava_pdrop.bench.report import check_out
    from llava_pdrop.bench.training import Arm, Trainer, measure
    from llava_pdrop.bench.workload import Workload
    from llava_pdrop.model.attention import check_backend
    from llava_pdrop.model.hardware import device_label, device_named

    device = device_named(args.device)
    name, shape = chosen_shape(args.shape, args.overrides, device.type == "cuda")
    attention = args.attention or shape.attention
    check_backend(attention)
    check_out(args.out)
    schedules = read_schedules(args.schedule, shape.text["num_hidden_layers"])
    if not schedules and shape.schedule.layers:
        schedules = {"PyramidDrop": shape.schedule}
    recompute = shape.recompute if args.recompute is None else args.recompute
    common = Arm(
        "", recompute=recompute, recompute_layers=shape.recompute_layers, backend=attention, samples=args.samples
    )
    arms = variants.arms_of(schedules, common)
    trainer = Trainer(shape, device, Workload(shape, args.images, args.seed), args.optimizer)
    results = measure(trainer, arms, args.steps, args.warmup)
    options = {key: getattr(args, key) for key in ("steps", "warmup", "samples", "optimizer")}
    options |= {"attention": attention, "recompute": recompute}
    report = training_report.training_report(trainer, name, results, options)
    stem = args.out / file_name("train", name, device_label(device))
    files = training_report.write(report, stem)
    for group in variants.compare(trainer, arms[:2]) if args.compare else ():
        training_report.add_comparison(report, group)
        training_report.write(report, stem)  # a time limit that ends the run costs one group, not all of it
    training_tables.show(report)
    print(f"written: {', '.join(str(file) for file in files)}")


def read_schedules(files: Sequence[Path], layers: int) -> dict[str, Schedule]:
    """File name without ending -> schedule, of YAML files that are runs with a ``pyramid_drop`` section or the section
    itself.

    Raises:
        ValueError: a file that is neither, a schedule that does not fit ``layers``, or two files of one name.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    from llava_pdrop.config import load_config
    from llava_pdrop.config_values import Problem, build_schedule

    found: dict[str, Schedule] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"--schedule: there is no file {file}")
        if file.stem in found or file.stem == "vanilla":
            raise ValueError(f"--schedule: {file}: the name {file.stem!r} is taken: rename the file")
        try:
            content = OmegaConf.to_container(OmegaConf.load(file))
        except YAMLError as error:
            raise ValueError(f"--schedule: {file} is no YAML: {' '.join(str(error).split())}") from None
        if isinstance(content, dict) and "layers" in content:
            try:
                schedule = build_schedule(content)
            except Problem as problem:
                raise ValueError(f"{file}: {problem}") from None
        else:
            section = load_config(file).pyramid_drop
            if section is None:
                raise ValueError(f"--schedule: {file}: no pyramid_drop section: add it, or name another file")
            schedule = section
        try:
            found[file.stem] = schedule.check(layers)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    return found
