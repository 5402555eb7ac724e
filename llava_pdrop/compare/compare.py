"""The main job: the same run with and without PyramidDrop, evaluated and compared in one table and one report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from llava_pdrop.checkpoint.build import Parts, build_parts
from llava_pdrop.compare import report
from llava_pdrop.compare.rows import Comparison, ComparisonRow
from llava_pdrop.compare.turns import saving
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.flops import predicted_reduction
from llava_pdrop.cost.lora import learning
from llava_pdrop.cost.nominal import recomputed_by
from llava_pdrop.data.conversation import TEMPLATES
from llava_pdrop.data.images import image_size
from llava_pdrop.data.tokens import Encoder
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import DROPPING, VANILLA, answer, check_scorer, load_questions, respondent_of
from llava_pdrop.eval.measure import load_benchmarks, measure
from llava_pdrop.eval.score import Score, paired
from llava_pdrop.eval.scores import refuse_unread, show
from llava_pdrop.eval.team import team_of
from llava_pdrop.geometry import ImageGeometry
from llava_pdrop.report.style import TABLE_WIDTH
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.arguments import training_arguments
from llava_pdrop.train.checks import check_run
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics, timing_of
from llava_pdrop.train.run import build_dataset, build_plan, prepare_data, say, train
from llava_pdrop.types import ImageInput, PackedBatch, Sample

console = Console()


@dataclass(frozen=True)
class Counted:
    """What operations are counted of: the Hugging Face config, how pictures become tokens, the run's micro-batches."""

    hf: Any
    geometry: ImageGeometry
    batches: list[PackedBatch]


def compare(config: Config) -> Path:
    """Trains vanilla and with PyramidDrop, evaluates both and the training-free variants, prints the table and writes
    ``output_dir/report.md``, whose path is returned.

    Raises:
        ConfigError: nothing to compare, or something named in the config is missing or impossible.
        SystemExit: with status 1, after all is written, where too many pictures of a benchmark cannot be read.
    """
    if config.pyramid_drop is None:
        raise ConfigError(f"{config.file}: pyramid_drop: is not set, so there is nothing to compare: add the section")
    if config.eval.training_free:
        raise ConfigError(
            f"{config.file}: eval.training_free: compare measures all of compare.training_free: leave the word out"
        )
    check_run(config)
    check_scorer(config)
    prepare_data(config)
    load_questions(config)  # a broken file is then said before hours of training
    load_benchmarks(config, llava=True)
    for line in missing_lines(config):
        say(line)
    runs = {}
    if config.compare.vanilla:
        runs[VANILLA] = train(_subrun(config.vanilla(), VANILLA))
    runs[DROPPING] = train(_subrun(config, DROPPING))
    comparison = collect(config, runs)
    if comparison is None:
        return Path(config.output_dir) / report.COMPARISON_FILE
    wide = console if console.is_terminal else Console(width=TABLE_WIDTH)
    wide.print(table(comparison.rows))
    for row in comparison.rows:
        if row.saving is not None:
            console.print(row.saving.describe().replace("*", ""), style="dim", highlight=False, markup=False)
    if comparison.scores:
        show(comparison.scores, "Benchmarks")
    file = report.write(comparison, Path(config.output_dir), table_rows(comparison.rows))
    console.print(f"report: {file}", soft_wrap=True)
    refuse_unread(comparison.scores, config.eval.max_unread)
    return file


def missing_lines(config: Config) -> list[str]:
    """What the table will lack because the config leaves it out, one line each."""
    lines = []
    if not config.compare.vanilla:
        lines.append(
            "compare.vanilla is false: no vanilla run, so no training-free rows and no saving, predicted or realised"
        )
    if config.data.eval is None:
        lines.append("data.eval is null: no accuracy, chance or image tokens per stage, and no example pictures")
    return lines


def collect(config: Config, runs: dict[str, Path]) -> Comparison | None:
    """Evaluates the finished ``runs`` and puts their numbers together. All processes share the questions; the first one
    alone has the numbers, the others None."""
    timings = {name: timing_of(directory / METRICS_FILE) for name, directory in runs.items()}
    questions = load_questions(config)
    loaded = load_benchmarks(config, llava=True)
    rows, scores = [], list[Score]()
    with team_of(config, Path(config.output_dir)) as team:
        for name, directory in runs.items():  # the one with dropping is the last
            parts = build_parts(path=str(directory))
            schedules = {name: config.schedule if name == DROPPING else Schedule()}
            if name == VANILLA:
                layers = parts.hf.config.text_config.num_hidden_layers
                schedules |= {f"{VANILLA} + {key}": s for key, s in config.training_free(layers).items()}
            for label, schedule in schedules.items():
                result = answer(config, parts, questions, schedule, label, team) if questions else None
                rows.append(ComparisonRow(label, schedule, result, timings.get(label)))
            paper = {DROPPING: config.paper.scores} if config.paper else {}
            scores += measure(config, respondent_of(parts, config), loaded, schedules, directory, team, paper)
            if name != DROPPING:
                del parts
                release_memory()
    if not team.first:
        return None
    examples = report.examples(config, parts, questions[: report.EXAMPLES], answer)
    if VANILLA in runs:
        counted = Counted(parts.hf.config, parts.geometry, training_batches(config, parts))
        del parts  # timing steps takes as much memory as training does
        release_memory()
        rows = _with_savings(config, rows, counted, runs[DROPPING])
    order = {name: place for place, name in enumerate([VANILLA, DROPPING])}
    rows.sort(key=lambda row: order.get(row.name, 2))
    losses = {name: _losses(directory / METRICS_FILE) for name, directory in runs.items()}
    return Comparison(config, rows, losses, runs, examples, paired(scores))


def training_batches(config: Config, parts: Parts) -> list[PackedBatch]:
    """The micro-batches of the run's first epoch as far as they are trained on, without their pixels."""
    args = training_arguments(config)
    dataset = build_dataset(config, parts)
    plan = build_plan(config, dataset, args)
    batches = plan.micro_batches(0)
    if args.max_steps > 0:
        batches = batches[: args.max_steps * args.gradient_accumulation_steps]

    rules = (TEMPLATES[config.model.template], parts.tokenizer, parts.hf.config.image_token_id, parts.geometry)
    encoder = Encoder(*rules, config.data.max_length, config.data.truncation)

    def sample(index: int) -> Sample:
        record = dataset.records[index]
        images = [ImageInput(torch.empty(0), image_size(path)) for path in record.images]
        return encoder.train(record, images)

    return [PackedBatch.pack([sample(index) for index in batch]) for batch in batches]


def table_rows(rows: Sequence[ComparisonRow]) -> list[list[str]]:
    """The table as text, the first line being its head."""
    cuda = any(row.timing is not None and row.timing.device == "cuda" for row in rows)
    head = ["run", "accuracy", "chance", "image tokens per stage", "CPU s/step", "wall s/step"]
    head += ["saved, predicted", "saved, realised", f"peak {'CUDA' if cuda else 'RSS'}"]
    lines = [head]
    for row in rows:
        result, timing = row.result, row.timing
        lines.append(
            [
                row.name,
                f"{result.accuracy:.1%}" if result else "-",
                f"{result.chance:.1%}" if result else "-",
                " → ".join(f"{count:g}" for count in result.image_tokens) if result else "-",
                f"{timing.cpu:.3f}" if timing else "not trained",
                f"{timing.wall:.3f}" if timing else "",
                f"{row.predicted:.1%}" if row.predicted is not None else "",
                _realised(row),
                f"{timing.peak_mib:,.0f} MiB" if timing else "",
            ]
        )
    return lines


def table(rows: Sequence[ComparisonRow]) -> Table:
    """The table for a terminal."""
    head, *lines = table_rows(rows)
    shown = Table(title="Vanilla and PyramidDrop", header_style="bold", box=box.SIMPLE_HEAD)
    for column, name in enumerate(head):
        shown.add_column(name, justify="left" if column == 0 else "right")
    for line in lines:
        shown.add_row(*line)
    return shown


def _realised(row: ComparisonRow) -> str:
    """The realised saving, its quartiles where there are any, and how much of the predicted one it is."""
    if row.saving is None:
        return ""
    inside = []
    if row.saving.quartiles is not None:
        inside.append(" to ".join(f"{100 * share:.1f}" for share in row.saving.quartiles))
    if row.predicted:
        inside.append(f"{row.saving.realised / row.predicted:.2f}x")
    return f"{row.saving.realised:.1%}" + (f" ({'; '.join(inside)})" if inside else "")


def _subrun(config: Config, name: str) -> Config:
    return replace(config, name=f"{config.name}/{name}", output_dir=str(Path(config.output_dir) / name))


def _with_savings(config: Config, rows: list[ComparisonRow], counted: Counted, directory: Path) -> list[ComparisonRow]:
    """Adds to the row with dropping, whose run lies in ``directory``, what was saved of the vanilla step's time, and
    what the operation count predicts for the same batches."""
    before, after = (next((r.timing for r in rows if r.name == name), None) for name in (VANILLA, DROPPING))
    if before is None or after is None:
        return rows
    args, batches = training_arguments(config), counted.batches
    found = saving(directory, after.device, before.seconds, after.seconds)
    if found.steps:
        size = args.gradient_accumulation_steps
        batches = [batch for step in found.steps for batch in batches[step * size : (step + 1) * size]]
    predicted = predicted_reduction(
        counted.hf,
        batches,
        config.schedule,
        counted.geometry,
        learning(config),
        recomputed_by(config, counted.hf.text_config.num_hidden_layers),
    )
    return [replace(r, predicted=predicted, saving=found) if r.name == DROPPING else r for r in rows]


def _losses(file: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(file) if "loss" in row]
