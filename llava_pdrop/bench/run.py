"""What the benches do with their arguments: measure, print a table, write the files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava_pdrop.errors import UserError
from llava_pdrop.schedule import Schedule

TILES = (1, 5, 9)
"""Tiles of a picture whose tokens are measured by default: 576, 2,880 and 5,184 image tokens of a 336-pixel tower."""


def run_train(args: argparse.Namespace) -> None:
    """Measures, prints the table, and writes JSON, Markdown and PNG.

    Raises:
        UserError: an argument that is not possible, a config that cannot be measured, or out of memory.
    """
    check_counts(args, steps=1, warmup=0, samples=1, seed=0)
    if args.recompute is not None and args.recompute_layers:
        given = "--recompute" if args.recompute else "--no-recompute"
        raise UserError(f"{given} and --recompute-layers contradict each other: leave one of them out")
    from torch import OutOfMemoryError

    from llava_pdrop.bench import recompute, train_report, variants
    from llava_pdrop.bench.shapes import chosen_shape
    from llava_pdrop.bench.train_step import BenchArm, BenchTrainer, measure_arms
    from llava_pdrop.bench.workload import Workload
    from llava_pdrop.cost.flops import ALL_LAYERS, Recomputed
    from llava_pdrop.cost.step_time import CARDS, card_named
    from llava_pdrop.model.attention import check_backend
    from llava_pdrop.model.kernels import check_kernels, resolve
    from llava_pdrop.report.environment import check_out, file_name
    from llava_pdrop.runtime.device import device_label, device_named, known_gpu

    device = device_named(args.device)
    if args.card is not None:
        card_named(args.card)
    name, shape = chosen_shape(args.shape, args.overrides, device.type == "cuda")
    attention = args.attention or shape.attention
    check_backend(attention)
    check_kernels(kernels := args.kernels or shape.kernels)
    kernels = resolve(kernels, device)
    check_out(args.out)
    schedules = read_schedules(args.schedule, shape.text["num_hidden_layers"])
    if not schedules and shape.schedule.layers:
        schedules = {"PyramidDrop": shape.schedule}
    depth, recomputed = shape.text["num_hidden_layers"], shape.recomputed
    if args.recompute is not None and args.recompute != bool(recomputed):
        recomputed = ALL_LAYERS if args.recompute else Recomputed()
    settings = [
        recompute.read_setting(word, 1 + len(schedules), depth) for word in dict.fromkeys(args.recompute_layers or ())
    ]
    common = BenchArm("", recomputed=recomputed, backend=attention, samples=args.samples, kernels=kernels)
    arms = variants.arms_of(schedules, common)
    workloads = [Workload(shape, images, args.seed) for images in dict.fromkeys(args.images)]
    trainer = BenchTrainer(shape, device, workloads[0], args.optimizer)
    own = known_gpu(device_label(device))
    card = args.card or (own if own in CARDS else None)
    options = {key: getattr(args, key) for key in ("steps", "warmup", "samples", "optimizer", "recompute_layers")}
    options |= {"attention": attention, "kernels": kernels, "recompute": bool(recomputed), "card": card}
    for workload in workloads:
        trainer.workload = workload
        chosen = recompute.arms_in(trainer, arms, settings, args.steps, args.card)
        patient = (OutOfMemoryError,) if len(settings) > 1 else ()
        results = measure_arms(trainer, chosen, args.steps, args.warmup, patient)
        report = train_report.training_report(trainer, name, results, options, card)
        part = f"-{workload.images}" if len(workloads) > 1 else ""
        stem = args.out / (file_name("train", name, device_label(device)) + part)
        files = train_report.write(report, stem)
        for group in variants.compare(trainer, chosen[:2]) if args.compare else ():
            train_report.add_comparison(report, group)
            train_report.write(report, stem)  # a time limit that ends the run costs one group, not all of it
        train_report.show(report)
        print(f"written: {', '.join(str(file) for file in files)}")


def read_schedules(files: Sequence[Path], layers: int) -> dict[str, Schedule]:
    """File name without ending -> schedule, of YAML files that are runs with a ``pyramid_drop`` section or the section
    itself.

    Raises:
        UserError: a file that is neither, a schedule that does not fit ``layers``, or two files of one name.
    """
    found: dict[str, Schedule] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"--schedule: there is no file {file}: check the path")
        if file.stem in found or file.stem == "vanilla":
            raise UserError(f"--schedule: {file}: the name {file.stem!r} is taken: rename the file")
        try:
            found[file.stem] = _schedule_of(file).check(layers)
        except UserError as error:
            said = str(error).removeprefix(f"{file}: ")  # errors of a whole config name it
            raise UserError(f"--schedule: {file}: {said}") from None
    return found


def _schedule_of(file: Path) -> Schedule:
    """The schedule that a YAML file is, or that its section ``pyramid_drop`` is."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    from llava_pdrop.config.load import load_config
    from llava_pdrop.config.values import build_schedule

    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"cannot be read as YAML: {' '.join(str(error).split())}") from None
    if isinstance(content, dict) and "layers" in content:
        return build_schedule(content)
    section = load_config(file).pyramid_drop
    if section is None:
        raise UserError("no pyramid_drop section: add it, or name another file")
    return section


def check_counts(args: argparse.Namespace, **least: int) -> None:
    """Numbers of the command line against the least that each may be; lists by their smallest entry.

    Raises:
        UserError: one is too small, or the seed is more than generators take.
    """
    for name, bound in least.items():
        given = getattr(args, name)
        value = min(given) if isinstance(given, list) else given
        if value is not None and value < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    if args.seed >= 2**32:
        raise UserError(f"--seed must be less than 2**32, got {args.seed}")


def run_prefill(args: argparse.Namespace) -> None:
    """Measures, prints a table, and writes JSON, Markdown and PNG.

    Raises:
        UserError: a shape, device or attention that is not there, a config that cannot be measured, or a count that
            is too small.
    """
    check_counts(args, batch=1, image_tokens=1, new_tokens=2, runs=1, seed=0)
    from llava_pdrop.bench.prefill import TEXT_TOKENS
    from llava_pdrop.bench.prefill_report import bench_prefill, show, write
    from llava_pdrop.bench.shapes import chosen_shape
    from llava_pdrop.cost.nominal import full_picture, paper_tokens
    from llava_pdrop.report.environment import check_out, file_name
    from llava_pdrop.runtime.device import device_label, device_named

    check_out(args.out)
    device = device_named(args.device)
    name, shape = chosen_shape(args.shape, args.overrides, device.type == "cuda")
    geometry = shape.geometry
    own = [paper_tokens(geometry, full_picture(geometry))] if args.overrides else None
    image_tokens = args.image_tokens or own or [tiles * geometry.patches for tiles in TILES]
    room = shape.text_config().max_position_embeddings - sum(TEXT_TOKENS)
    if args.new_tokens >= room:
        raise UserError(f"--new-tokens must be less than {room}: the decoder has no positions for more")
    if max(image_tokens) > room - args.new_tokens:
        raise UserError(
            f"--image-tokens must be at most {room - args.new_tokens}: the decoder has no positions for more"
        )
    report = bench_prefill(
        name, shape, device, args.batch, image_tokens, args.new_tokens, args.runs, args.seed, args.attention
    )
    show(report)
    files = write(report, args.out, file_name("prefill", name, device_label(device)))
    print(f"written: {', '.join(str(file) for file in files)}")
