"""The main job: the same run with and without PyramidDrop, evaluated and compared in one table and one report.

That is an ablation with two variants, ``vanilla`` and ``pyramid_drop``, and some that are evaluated only: the vanilla
model with schedules that it was not trained with (``compare.training_free``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llava_pdrop.compare import figures
from llava_pdrop.compare.candidates import Candidate, run_variants, subrun
from llava_pdrop.compare.rows import VariantRow, publish
from llava_pdrop.compare.survivors import surviving_tokens
from llava_pdrop.config.paths import decoder_layers
from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import DROPPING, VANILLA
from llava_pdrop.eval.measure import chosen
from llava_pdrop.eval.score import as_json, paired
from llava_pdrop.report.environment import environment, settings
from llava_pdrop.report.page import Note, Picture, Table
from llava_pdrop.train.checks import checked
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics

COMPARISON_FILE, RESULTS_FILE = "report.md", "results.json"
EXAMPLES = 6
"""Held-out pictures shown with the image tokens that survive."""


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
    if config.compare.vanilla:
        config.training_free(decoder_layers(config.model))  # one that cannot be is said before anything is trained
    whole, out = checked(config), Path(config.output_dir)
    names = tuple(benchmark.name for benchmark in chosen(config))  # the run's own, also where vanilla is asked
    config = replace(config, eval=replace(config.eval, benchmarks=names))
    models = []
    if config.compare.vanilla:
        run = whole.variant(subrun(config.vanilla(), VANILLA))
        models.append(Candidate((VariantRow(VANILLA, run.config),), run, config.training_free))
    run = whole.variant(subrun(config, DROPPING))
    models.append(Candidate((VariantRow(DROPPING, run.config, paper=config.paper),), run, pictures=EXAMPLES))
    rows = run_variants(models, out)
    if rows is None:
        return out / COMPARISON_FILE
    facts = {
        "name": config.name,
        "seed": config.seed,
        "rows": [{**row.facts(), **(row.evaluation or {})} for row in rows],
        "benchmarks": [as_json(score) for score in paired([score for row in rows for score in row.scores])],
    }
    title, made = f"{config.name}: vanilla and PyramidDrop", Note(f"## Settings\n\n{made_by(config, rows).markdown()}")
    return publish(rows, title, out, (COMPARISON_FILE, RESULTS_FILE), pictures(rows), [made], facts)


def pictures(rows: Sequence[VariantRow]) -> list[Picture]:
    """Those for which there are numbers."""
    losses = {
        row.name: [(line["step"], line["loss"]) for line in read_metrics(file) if "loss" in line]
        for row, file in ((row, Path(row.config.output_dir) / METRICS_FILE) for row in rows if row.timing)
    }
    drawn = []
    if losses:
        drawn += [
            Picture("loss.png", "Training loss", lambda: figures.loss_curves(losses)),
            Picture("step_time.png", "Time per training step", lambda: figures.step_times(rows)),
        ]
    if shown := [example for row in rows for example in row.examples]:
        caption = "Image tokens that survive each stage, on held-out pictures (dropped patches are dark)"
        drawn.append(Picture("tokens.png", caption, lambda: surviving_tokens(shown)))
    return drawn


def made_by(config: Config, rows: Sequence[VariantRow]) -> Table:
    """What was trained, by what, and where."""
    return settings(
        environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), config.seed),
        config=f"`{config.file or config.name}`",
        schedule=", ".join(f"{name} `{value}`" for name, value in config.schedule.to_dict().items()),
        steps=", ".join(f"{row.name} {row.timing.steps}" for row in rows if row.timing),
        training=", ".join(f"{name} `{value}`" for name, value in sorted(config.train.arguments.items())),
        runs=", ".join(f"`{Path(row.config.output_dir).name}`" for row in rows if row.timing),
    )
