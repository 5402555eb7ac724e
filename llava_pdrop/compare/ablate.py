"""Runs an ablation: all variants are checked, then trained one after the other (or evaluated), then put together."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llava_pdrop.compare import figures
from llava_pdrop.compare.budgets import Budget
from llava_pdrop.compare.candidates import Candidate, run_variants
from llava_pdrop.compare.pareto import Shown, marks, shown_rows
from llava_pdrop.compare.rows import VariantRow, publish, table
from llava_pdrop.compare.variants import Ablation, Variant
from llava_pdrop.cost.flops import CountedStep, predicted_reduction
from llava_pdrop.cost.nominal import model_of, nominal_batch
from llava_pdrop.cost.plan import make_plan, plan_step
from llava_pdrop.errors import ConfigError
from llava_pdrop.report.environment import environment
from llava_pdrop.report.page import Note, Picture, Table
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.checks import checked

ABLATION_FILE, RESULTS_FILE, PICTURE_FILE = "ablation.md", "ablation.json", "ablation.png"
FRONT_FILE = "pareto.png"

ABOUT_FRONT = (
    "On the Pareto front is a row than which no other has at least its score in at most its time, and one of the two "
    "better. Means decide: what lies within the errors of another may be there by chance. The time of *training* is "
    "without stage 1, and where *realised* is known it is what that leaves of vanilla's; a training-free row has that "
    "of its model. The time of an *answer* holds what else the machine did. A *baseline* looks at nothing: tokens are "
    "drawn, spread evenly or pooled. Vanilla stands first, then the best score."
)


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
            step = CountedStep(model.config, batch, config.schedule, model.geometry, trainable=())
            predicted = predicted_reduction([step])
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
        models = [
            Candidate((row,), run, _tried_on(variant, ablation) if ablation.also_training_free else None)
            for row, run, variant in zip(rows, runs, ablation.variants)
        ]
    elif rows[0].config.eval.training_free:
        raise ConfigError(f"{ablation.file}: eval.training_free: the variants are the schedules: leave the word out")
    else:
        models = [Candidate(tuple(rows))]
    measured = run_variants(models, ablation.output_dir)
    if measured is None:
        return
    words = [(variant.name, f"`{shlex.join(variant.words)}`") for variant in ablation.variants]
    device = torch.device("cuda" if any(row.device == "cuda" for row in measured) else "cpu")
    shown = shown_rows(ablation.variants, measured)
    drawn = [each.row for each in shown]
    pictures = [Picture(PICTURE_FILE, "image tokens, what is saved, accuracy", lambda: figures.variants(drawn))]
    notes = [Note(text) for text in ablation.notes]
    if sum(bool(each.score and each.times) for each in shown) > 1:
        pictures.append(Picture(FRONT_FILE, "Pareto front: score over time", lambda: figures.pareto(shown)))
        notes.append(Note(ABOUT_FRONT))
    publish(
        drawn,
        ablation.name,
        ablation.output_dir,
        (ABLATION_FILE, RESULTS_FILE),
        pictures,
        [*notes, Note(Table(("variant", "what it is"), words, left=2).markdown())],
        {
            "name": ablation.name,
            "checkpoint": ablation.checkpoint,
            "environment": environment(device, rows[0].config.seed),
            "variants": [_facts(row, variant.words) for variant, row in zip(ablation.variants, measured)],
            "training_free": [_facts(row, ()) for row in measured[len(ablation.variants) :]],
            "rows": [each.facts() for each in shown],
        },
        [_table(shown, budget) for budget in ablation.budgets],
    )


def _tried_on(model: Variant, ablation: Ablation) -> Callable[[int], Mapping[str, Schedule]] | None:
    """The schedules of all variants of the same seed, for the vanilla run ``model``; None for other runs."""
    if not model.config.schedule.vanilla:
        return None
    others = [each for each in ablation.variants if each.config.seed == model.config.seed]
    schedules = {each.row: each.config.schedule for each in others if not each.config.schedule.vanilla}
    return lambda layers: schedules


def _table(shown: Sequence[Shown], budget: Budget) -> Table:
    """Of the rows that have the ``budget``, and of the vanilla ones."""
    found = [each for each in shown if budget in each.budgets]
    return table([each.row for each in found], budget.title, marks(found))


def _facts(row: VariantRow, words: Sequence[str]) -> dict[str, Any]:
    plan = row.plan or make_plan(row.config, ())
    return {
        **row.facts(),
        "words": words,
        "pyramid_drop": row.schedule.to_dict(),
        "image_tokens": [stage.image_tokens for stage in plan.stages],
        "average_tokens": plan.average_tokens,
        "tflop_paper_formula": plan.paper.dropping,
    }
