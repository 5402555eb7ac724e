"""Runs an ablation: all variants are checked, then trained one after the other (or evaluated), then put together."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import torch

from llava_pdrop.compare import figures
from llava_pdrop.compare.candidates import Candidate, run_variants
from llava_pdrop.compare.rows import VariantRow, publish
from llava_pdrop.compare.variants import Ablation
from llava_pdrop.cost.flops import predicted_reduction
from llava_pdrop.cost.nominal import model_of, nominal_batch
from llava_pdrop.cost.plan import make_plan, plan_step
from llava_pdrop.errors import ConfigError
from llava_pdrop.report.environment import environment
from llava_pdrop.report.page import Note, Picture, Table
from llava_pdrop.train.checks import checked

ABLATION_FILE, RESULTS_FILE, PICTURE_FILE = "ablation.md", "ablation.json", "ablation.png"


def plan(ablation: Ablation) -> list[VariantRow]:
    """The table as far as it is known without weights and data.

    Raises:
        ConfigError: the sizes of a variant's model are not known here.
    """
    rows = []
    for variant in ablation.variants:
        config, predicted = variant.config, None
        if not config.schedule.vanilla and ablation.checkpoint is None:
            predicted = plan_step(config).reduction
        elif not config.schedule.vanilla:
            model = model_of(config)
            batch = nominal_batch(model.geometry, config)
            predicted = predicted_reduction(model.config, [batch], config.schedule, model.geometry, trainable=())
        paper = config.paper if ablation.checkpoint is None else None  # which is about trained models
        rows.append(VariantRow(variant.name, config, make_plan(config), predicted=predicted, paper=paper))
    return rows


def ablate(ablation: Ablation, rows: Sequence[VariantRow]) -> None:
    """Trains what is not finished yet, measures, prints the table and writes ``ablation.md``. Names, files and
    questions of every variant are checked before the first one starts.

    Args:
        rows: of `plan`.

    Raises:
        ConfigError: a run cannot be made; a checkpoint is given, but no questions.
        Preempted: a signal said stop; the same call goes on.
        SystemExit: with status 1, after all is written, where too many pictures of a benchmark cannot be read.
    """
    if ablation.checkpoint is None:
        runs = [checked(row.config) for row in rows]
        models = [Candidate((row,), run) for row, run in zip(rows, runs)]
    elif rows[0].config.eval.training_free:
        raise ConfigError(f"{ablation.file}: eval.training_free: the variants are the schedules: leave the word out")
    else:
        models = [Candidate(tuple(rows))]
    measured = run_variants(models, ablation.output_dir)
    if measured is None:
        return
    words = [(variant.name, f"`{shlex.join(variant.words)}`") for variant in ablation.variants]
    device = torch.device("cuda" if any(row.device == "cuda" for row in measured) else "cpu")
    publish(
        measured,
        ablation.name,
        ablation.output_dir,
        (ABLATION_FILE, RESULTS_FILE),
        [Picture(PICTURE_FILE, "image tokens, what is saved, accuracy", lambda: figures.variants(measured))],
        [Note(Table(("variant", "what it is"), words, left=2).markdown())],
        {
            "name": ablation.name,
            "checkpoint": ablation.checkpoint,
            "environment": environment(device, rows[0].config.seed),
            "variants": [_facts(row, variant.words) for variant, row in zip(ablation.variants, measured)],
        },
    )


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
