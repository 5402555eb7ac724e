"""Runs an ablation: all variants are checked, then trained one after the other (or evaluated), then put together."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.shards import resolve
from llava_pdrop.compare import figures, turns
from llava_pdrop.compare.counted import with_predictions
from llava_pdrop.compare.evaluated import Exam, evaluated
from llava_pdrop.compare.rows import (
    Saving,
    VariantRow,
    below_the_table,
    finished_run,
    legend,
    table,
    with_savings,
)
from llava_pdrop.compare.variants import Ablation
from llava_pdrop.cost.flops import predicted_reduction
from llava_pdrop.cost.nominal import model_of, nominal_batch
from llava_pdrop.cost.plan import make_plan, plan_step
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import evaluate_config, respondent_of
from llava_pdrop.eval.measure import measure_config
from llava_pdrop.eval.score import Score
from llava_pdrop.eval.team import team_of
from llava_pdrop.report.console import say
from llava_pdrop.report.environment import environment
from llava_pdrop.report.page import Block, Note, Page, Picture, Table
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.train.checks import checked
from llava_pdrop.train.run import prepare_data, train_checked

ABLATION_FILE, RESULTS_FILE, PICTURE_FILE = "ablation.md", "ablation.json", "ablation.png"


def plan(ablation: Ablation) -> list[VariantRow]:
    """The table as far as it is known without weights and data.

    Raises:
        ConfigError: the sizes of a variant's model are not known here.
    """
    rows = []
    for variant in ablation.variants:
        config, predicted = variant.config, None
        if config.schedule.layers and ablation.checkpoint is None:
            predicted = plan_step(config).reduction
        elif config.schedule.layers:
            model = model_of(config)
            batch = nominal_batch(model.geometry, config)
            predicted = predicted_reduction(model.config, [batch], config.schedule, model.geometry, trainable=())
        paper = config.paper if ablation.checkpoint is None else None  # which is about trained models
        rows.append(VariantRow(variant.name, config, make_plan(config), predicted=predicted, paper=paper))
    return rows


def ablate(ablation: Ablation, rows: Sequence[VariantRow]) -> list[VariantRow] | None:
    """Trains what is not finished yet and measures; None on all but the first process. Names, files and questions of
    every variant are checked before the first one starts.

    Args:
        rows: of `plan`.

    Raises:
        ConfigError: a run cannot be made; a checkpoint is given, but no questions.
        Preempted: a signal said stop; the same call goes on.
    """
    configs = [variant.config for variant in ablation.variants]
    runs = [checked(config) for config in configs] if ablation.checkpoint is None else []
    for config in configs:
        prepare_data(config)
        exam = Exam.of(config)
    for line in missing_lines(ablation):
        say(line)
    if ablation.checkpoint is not None:
        return _of_checkpoint(ablation, ablation.checkpoint, rows, exam)
    scores = list[tuple[Score, ...]]()
    for number, (row, run) in enumerate(zip(rows, runs), 1):
        say(f"variant {number} of {len(rows)}: {row.name}")
        train_checked(run)
        if row.config.data.eval is not None:
            evaluate_config(row.config)
            release_memory()
        scores.append(_in_columns_of(row.name, measure_config(row.config) if row.config.eval.benchmarks else []))
        release_memory()
    if os.environ.get("RANK", "0") != "0":
        return None
    measured = [
        replace(run, name=row.name, config=row.config, plan=row.plan, scores=own)
        for row, own in zip(rows, scores)
        for run in [finished_run(Path(row.config.output_dir))]
    ]
    return with_predictions(with_savings(measured, turns.saving))


def _in_columns_of(name: str, scores: Sequence[Score]) -> tuple[Score, ...]:
    """The ``scores`` of a variant under its ``name``; of a benchmark the first one is that of its own schedule."""
    first = {score.benchmark: score for score in reversed(scores)}
    return tuple(
        replace(score, column=name if score is first[score.benchmark] else f"{name} + {score.column}")
        for score in scores
    )


def missing_lines(ablation: Ablation) -> list[str]:
    """What the table will lack because of what the ablation leaves out, one line each."""
    lines = []
    if all(variant.config.schedule.layers for variant in ablation.variants):
        lines.append("no variant without drops: no realised saving (add vanilla: {pyramid_drop: null})")
    if all(variant.config.data.eval is None for variant in ablation.variants):
        lines.append("data.eval is null: no accuracy")
    return lines


def _of_checkpoint(
    ablation: Ablation, checkpoint: str, rows: Sequence[VariantRow], exam: Exam
) -> list[VariantRow] | None:
    """``checkpoint`` with the schedule of every variant; None on all but the first process."""
    first, out = rows[0].config, ablation.output_dir
    if first.eval.training_free:
        raise ConfigError(f"{ablation.file}: eval.training_free: the variants are the schedules: leave the word out")
    if not exam.questions and not exam.benchmarks:
        raise ConfigError(f"{ablation.file}: data.eval: names no file with questions, and nothing is trained")
    with team_of(first, out) as team:
        parts = build_parts(path=checkpoint)
        if parts.geometry != model_of(first).geometry:
            raise ConfigError(
                f"{ablation.file}: checkpoint {checkpoint} cuts pictures otherwise than {first.file} says: "
                f"{parts.geometry}"
            )
        found = evaluated(rows, respondent_of(parts, first), exam, team, out, resolve(checkpoint), out)
    reason = "the mean time of an answer"
    saved = with_savings(found, lambda _, before, after: Saving.one_after_the_other(before, after, reason))
    return saved if team.first else None


def page_of(ablation: Ablation, rows: Sequence[VariantRow]) -> Page:
    """The report."""
    of_checkpoint = (
        f"Nothing was trained: one model, `{ablation.checkpoint}`, answered all questions with each schedule. Seconds "
        "are of a whole answer, reading the picture included; *predicted* counts the operations of reading a full "
        "picture and 200 text tokens."
    )
    words = [(variant.name, f"`{shlex.join(variant.words)}`") for variant in ablation.variants]
    blocks: list[Block] = [
        table(rows, "Variants"),
        Note(" ".join([legend(rows), *([] if ablation.checkpoint is None else [of_checkpoint])])),
        Picture(PICTURE_FILE, "image tokens, what is saved, accuracy", lambda: figures.variants(rows)),
        *below_the_table(rows),
        Note(Table(("variant", "what it is"), words, left=2).markdown()),
    ]
    device = torch.device("cuda" if any(row.device == "cuda" for row in rows) else "cpu")
    facts = {
        "name": ablation.name,
        "checkpoint": ablation.checkpoint,
        "environment": environment(device, rows[0].config.seed),
        "variants": [_facts(row, variant.words) for variant, row in zip(ablation.variants, rows)],
    }
    return Page(ablation.name, blocks, facts)


def _facts(row: VariantRow, words: Sequence[str]) -> dict[str, Any]:
    assert row.plan is not None
    return {
        **row.facts(),
        "words": words,
        "pyramid_drop": row.schedule.to_dict(),
        "image_tokens": [stage.image_tokens for stage in row.plan.stages],
        "average_tokens": row.plan.average_tokens,
        "tflop_paper_formula": row.plan.paper.dropping,
    }
