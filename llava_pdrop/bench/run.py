"""The benches from what is asked for to their files: measure, print the tables, write JSON, Markdown and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_pdrop.bench import generate_report, prefill_report, train_report
from llava_pdrop.bench.rankings import ranker_costs
from llava_pdrop.bench.recompute import arms_in, read_setting
from llava_pdrop.bench.shapes import chosen_shape
from llava_pdrop.bench.subjects import TEXT_TOKENS, Subject, checked, refuse_pooling
from llava_pdrop.bench.train_step import BenchArm, BenchTrainer, measure_arms
from llava_pdrop.bench.variants import arms_of, compare
from llava_pdrop.bench.workload import Workload
from llava_pdrop.config.load import load_config
from llava_pdrop.config.presets import bare_schedule
from llava_pdrop.config.values import read_mapping
from llava_pdrop.cost.flops import ALL_LAYERS, Recomputed
from llava_pdrop.cost.nominal import full_picture, paper_tokens
from llava_pdrop.cost.step_time import CARDS, card_named
from llava_pdrop.errors import UserError
from llava_pdrop.model.attention import check_backend
from llava_pdrop.model.kernels import check_kernels, resolve
from llava_pdrop.model.rankers import check_rankers
from llava_pdrop.report.environment import check_out, file_name
from llava_pdrop.runtime.device import device_label, device_named, known_gpu
from llava_pdrop.schedule import Schedule

OUT = Path("playground/benchmarks")

TILES = (1, 5, 9)
"""Tiles of a picture whose tokens are measured by default: 576, 2,880 and 5,184 image tokens of a 336-pixel tower."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What both benches are asked for, by the names of their options; ``overrides`` is CONFIG with its overrides."""

    overrides: Sequence[str] = ()
    shape: str | None = None
    seed: int = 0
    device: str | None = None
    out: Path = OUT


@dataclass(frozen=True, kw_only=True)
class TrainSettings(BenchSettings):
    """What ``bench train`` is asked for."""

    schedule: Sequence[Path] = ()
    steps: int = 10
    warmup: int = 2
    samples: int | None = None
    images: Sequence[str] = ("mixture",)
    optimizer: str = "auto"
    recompute: bool | None = None
    recompute_layers: Sequence[str] = ()
    card: str | None = None
    attention: str | None = None
    kernels: str | None = None
    compare: bool = False


@dataclass(frozen=True, kw_only=True)
class PrefillSettings(BenchSettings):
    """What ``bench prefill`` is asked for."""

    batch: Sequence[int] = (1, 8)
    image_tokens: Sequence[int] = ()
    new_tokens: int = 32
    runs: int = 10
    attention: str | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(PrefillSettings):
    """What ``bench generate`` is asked for; the first of ``overrides`` may be a directory with weights."""

    batch: Sequence[int] = (1, 4)
    runs: int = 5


def run_train(asked: TrainSettings) -> list[dict[str, Any]]:
    """Measures a training step; returns a report for each kind of pictures.

    Raises:
        UserError: a setting that is not possible, a config that cannot be measured, or out of memory.
    """
    check_counts(asked, steps=1, warmup=0, samples=1)
    if asked.recompute is not None and asked.recompute_layers:
        given = "--recompute" if asked.recompute else "--no-recompute"
        raise UserError(f"{given} and --recompute-layers contradict each other: leave one of them out")
    device = device_named(asked.device)
    if asked.card is not None:
        card_named(asked.card)
    name, shape = chosen_shape(asked.shape, asked.overrides, device.type == "cuda")
    attention = asked.attention or shape.attention
    check_backend(attention, "--attention" if asked.attention else "model.attention")
    kernels = asked.kernels or shape.kernels
    key = "--kernels" if asked.kernels else "model.kernels"
    check_kernels(kernels, key)
    kernels = resolve(kernels, device, key)
    check_out(asked.out)
    depth, recomputed = shape.text["num_hidden_layers"], shape.recomputed
    schedules = read_schedules(asked.schedule, depth)
    if not schedules and not shape.schedule.vanilla:
        schedules = {"PyramidDrop": shape.schedule}
    if asked.recompute is not None and asked.recompute != bool(recomputed):
        recomputed = ALL_LAYERS if asked.recompute else Recomputed()
    settings = [read_setting(word, 1 + len(schedules), depth) for word in dict.fromkeys(asked.recompute_layers)]
    common = BenchArm("", recomputed=recomputed, backend=attention, samples=asked.samples, kernels=kernels)
    workloads = [Workload(shape, images, asked.seed) for images in dict.fromkeys(asked.images)]
    trainer = BenchTrainer(shape, device, workloads[0], asked.optimizer)
    own = known_gpu(device_label(device))
    card = asked.card or (own if own in CARDS else None)
    options = {key: getattr(asked, key) for key in ("steps", "warmup", "samples", "optimizer")}
    options |= {"recompute_layers": asked.recompute_layers or None, "recompute": bool(recomputed)}
    options |= {"attention": attention, "kernels": kernels, "card": card}
    reports = []
    for workload in workloads:
        trainer.workload = workload
        arms = arms_in(trainer, arms_of(schedules, common), settings, asked.steps, asked.card)
        patient = (torch.OutOfMemoryError,) if len(settings) > 1 else ()
        results = measure_arms(trainer, arms, asked.steps, asked.warmup, patient)
        report = train_report.training_report(trainer, name, results, options, card)
        part = f"-{workload.images}" if len(workloads) > 1 else ""
        stem = asked.out / (file_name("train", name, device_label(device)) + part)
        files = train_report.write(report, stem)
        for group in compare(trainer, arms[:2]) if asked.compare else ():
            train_report.add_comparison(report, group)
            train_report.write(report, stem)  # a time limit that ends the run costs one group, not all of it
        if asked.compare:
            report["rankers"] = ranker_costs(trainer, arms[0])
            train_report.write(report, stem)
        train_report.page(report, "").show()
        print(f"written: {', '.join(map(str, files))}")
        reports.append(report)
    return reports


def run_prefill(asked: PrefillSettings) -> dict[str, Any]:
    """Measures prompts and answers; returns the report.

    Raises:
        UserError: a shape, device or attention that is not there, a config that cannot be measured, or a count that
            is too small.
    """
    check_counts(asked, batch=1, image_tokens=1, new_tokens=2, runs=1)
    check_out(asked.out)
    device = device_named(asked.device)
    name, shape = chosen_shape(asked.shape, asked.overrides, device.type == "cuda")
    geometry = shape.geometry
    largest = paper_tokens(geometry, full_picture(geometry))
    usual = [largest] if asked.overrides else [tiles * geometry.patches for tiles in TILES]
    image_tokens = asked.image_tokens or usual
    room = shape.text_config().max_position_embeddings - sum(TEXT_TOKENS)
    if asked.new_tokens >= room:
        raise UserError(f"--new-tokens must be less than {room}: the decoder has no positions for more")
    if max(image_tokens) > room - asked.new_tokens:
        raise UserError(
            f"--image-tokens must be at most {room - asked.new_tokens}: the decoder has no positions for more"
        )
    refuse_pooling(shape.schedule, "bench prefill")
    subject = Subject.of_shape(shape, device, asked.seed, "sdpa" if asked.attention is None else asked.attention)
    cases = [(batch, tokens) for tokens in image_tokens for batch in asked.batch]
    report = prefill_report.bench_prefill(name, subject, device, cases, asked.new_tokens, asked.runs, asked.seed)
    stem = file_name("prefill", name, device_label(device))
    page = prefill_report.page(report, f"{stem}.png")
    page.show()
    print(f"written: {', '.join(map(str, page.write(asked.out, f'{stem}.md', f'{stem}.json')))}")
    return report


def run_generate(asked: GenerateSettings) -> dict[str, Any]:
    """Measures answers token by token; returns the report.

    Raises:
        UserError: a model, shape, device or attention that is not there, one without a schedule, a count that is too
            small, or ``--image-tokens`` for a model whose processor says how many there are.
    """
    check_counts(asked, batch=1, image_tokens=1, new_tokens=2, runs=1)
    check_out(asked.out)
    device = device_named(asked.device)
    directory = Path(asked.overrides[0]) if asked.overrides else None
    if directory is not None and directory.is_dir():
        if asked.shape is not None:
            raise UserError(f"--shape {asked.shape} and {directory} exclude each other: give one of them")
        if asked.image_tokens:
            raise UserError(
                f"--image-tokens: {directory} says itself how many tokens a picture has: leave it out, or give a CONFIG"
            )
        name = directory.resolve().name
        subject = Subject.of_directory(directory, list(asked.overrides[1:]), device, asked.seed, asked.attention)
    else:
        name, shape = chosen_shape(asked.shape, asked.overrides, device.type == "cuda")
        room = shape.text_config().max_position_embeddings - sum(TEXT_TOKENS)
        longest = max(asked.image_tokens, default=paper_tokens(shape.geometry, full_picture(shape.geometry)))
        if longest + asked.new_tokens > room:
            raise UserError(
                f"--image-tokens and --new-tokens must be at most {room} together, got {longest} and "
                f"{asked.new_tokens}: the decoder has no positions for more"
            )
        refuse_pooling(shape.schedule, "bench generate")
        checked(shape.schedule, "CONFIG")
        subject = Subject.of_shape(shape, device, asked.seed, "sdpa" if asked.attention is None else asked.attention)
    cases = [(batch, tokens) for tokens in asked.image_tokens or (None,) for batch in asked.batch]
    report = generate_report.bench_generate(name, subject, device, cases, asked.new_tokens, asked.runs, asked.seed)
    stem = file_name("generate", name, device_label(device))
    page = generate_report.page(report, f"{stem}.png")
    page.show()
    print(f"written: {', '.join(map(str, page.write(asked.out, f'{stem}.md', f'{stem}.json')))}")
    return report


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
            found[file.stem] = _schedule_of(file, layers).check(layers)
            check_rankers(found[file.stem])
        except UserError as error:
            said = str(error).removeprefix(str(file)).lstrip(": ")  # most errors name it
            raise UserError(f"--schedule: {file}: {said}") from None
    return found


def _schedule_of(file: Path, layers: int) -> Schedule:
    """The schedule that a YAML file is, or that its section ``pyramid_drop`` is."""
    content = read_mapping(file)
    if content.keys() & {"layers", "downsample"}:
        return bare_schedule(content, layers)
    section = load_config(file).pyramid_drop
    if section is None:
        raise UserError("no pyramid_drop section: add it, or name another file")
    return section


def check_counts(asked: BenchSettings, **least: int) -> None:
    """Numbers of ``asked`` against the least that each may be; lists by their smallest entry.

    Raises:
        UserError: one is too small, or the seed is more than generators take.
    """
    for name, bound in (least | {"seed": 0}).items():
        given = getattr(asked, name)
        value = min(given, default=None) if isinstance(given, list | tuple) else given
        if value is not None and value < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, got {value}")
    if asked.seed >= 2**32:
        raise UserError(f"--seed must be less than 2**32, got {asked.seed}")
