"""The main job: the same run with and without PyramidDrop, evaluated and compared in one table and one report.

That is an ablation with two variants, ``vanilla`` and ``pyramid_drop``, and some that are evaluated only: the vanilla
model with schedules that it was not trained with (``compare.training_free``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.compare import figures, turns
from llava_pdrop.compare.counted import with_predictions
from llava_pdrop.compare.evaluated import Exam, evaluated
from llava_pdrop.compare.rows import VariantRow, below_the_table, legend, table, with_savings
from llava_pdrop.compare.survivors import Example, examples, surviving_tokens
from llava_pdrop.config.schema import Config
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import DROPPING, VANILLA, respondent_of
from llava_pdrop.eval.score import as_json, paired
from llava_pdrop.eval.score_table import refuse_unread, show
from llava_pdrop.eval.team import team_of
from llava_pdrop.report.console import say
from llava_pdrop.report.environment import environment
from llava_pdrop.report.page import Block, Note, Page, Picture, Table
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.train.checks import checked
from llava_pdrop.train.metrics import METRICS_FILE, read_metrics, timing_of
from llava_pdrop.train.run import prepare_data, train_checked

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
    whole = checked(config)
    prepare_data(config)
    exam = Exam.of(config)
    for line in missing_lines(config):
        say(line)
    out = Path(config.output_dir)
    runs = {VANILLA: _subrun(config.vanilla(), VANILLA)} if config.compare.vanilla else {}
    runs[DROPPING] = _subrun(config, DROPPING)
    for run in [whole.variant(run) for run in runs.values()]:
        train_checked(run)
    found = evaluated_runs(config, runs, exam)
    if found is None:
        return out / COMPARISON_FILE
    rows, shown = found
    release_memory()  # timing steps takes as much as training does
    if config.compare.vanilla:
        trained, free = rows[: len(runs)], rows[len(runs) :]
        rows = [*with_predictions(with_savings(trained, turns.saving)), *free]
    page, scores = page_of(config, rows, shown), [score for row in rows for score in row.scores]
    page.show()
    if scores:
        show(paired(scores), "Benchmarks")
    file, *_ = page.write(out, COMPARISON_FILE, RESULTS_FILE)
    say(f"report: {file}")
    refuse_unread(scores, config.eval.max_unread)
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


def evaluated_runs(
    config: Config, runs: dict[str, Config], exam: Exam
) -> tuple[list[VariantRow], list[Example]] | None:
    """The finished ``runs`` with their answers, those of the training-free variants behind them, and examples of what
    survives. All processes share the questions; the first one alone has the numbers, the others None."""
    trained, free = list[VariantRow](), list[VariantRow]()
    with team_of(config, Path(config.output_dir)) as team:
        for name, run in runs.items():
            directory = Path(run.output_dir)
            parts, timing = build_parts(path=run.output_dir), timing_of(directory / METRICS_FILE)
            rows = [VariantRow(name, run, timing=timing, paper=run.paper)]
            if name == VANILLA:
                schedules = config.training_free(parts.hf.config.text_config.num_hidden_layers)
                rows += [
                    VariantRow(f"{VANILLA} + {key}", replace(run, pyramid_drop=schedule))
                    for key, schedule in schedules.items()
                ]
            respondent = respondent_of(parts, run)
            own, *others = evaluated(rows, respondent, exam, team, Path(config.output_dir), directory, directory)
            trained, free = [*trained, own], [*free, *others]
            if name != DROPPING:
                del parts, respondent
                release_memory()
    if not team.first:
        return None
    return [*trained, *free], examples(exam.settings, respondent, exam.questions[:EXAMPLES], config.schedule)


def page_of(config: Config, rows: Sequence[VariantRow], shown: Sequence[Example]) -> Page:
    """The report."""
    losses = {
        row.name: [(line["step"], line["loss"]) for line in read_metrics(file) if "loss" in line]
        for row in rows
        if row.timing and (file := Path(row.config.output_dir) / METRICS_FILE).is_file()
    }
    blocks: list[Block] = [
        table(rows, "Vanilla and PyramidDrop"),
        Note(f"{legend(rows)} A row `vanilla + x` is the vanilla model with dropping at inference only."),
        *below_the_table(rows),
    ]
    if losses:
        blocks += [
            Picture("loss.png", "Training loss", lambda: figures.loss_curves(losses)),
            Picture("step_time.png", "Time per training step", lambda: figures.step_times(rows)),
        ]
    if shown:
        caption = "Image tokens that survive each stage, on held-out pictures (dropped patches are dark)"
        blocks.append(Picture("tokens.png", caption, lambda: surviving_tokens(shown)))
    made = Table(("", ""), list(settings(config, rows).items()), left=2)
    blocks.append(Note(f"## Settings\n\n{made.markdown()}"))
    facts = {
        "name": config.name,
        "seed": config.seed,
        "rows": [{**row.facts(), **(row.evaluation or {})} for row in rows],
        "benchmarks": [as_json(score) for score in paired([score for row in rows for score in row.scores])],
    }
    return Page(f"{config.name}: vanilla and PyramidDrop", blocks, facts)


def settings(config: Config, rows: Sequence[VariantRow]) -> dict[str, str]:
    """What was trained, by what, and where."""
    arguments = {**config.train.arguments, "seed": config.seed}
    where = environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"), config.seed)
    return {
        "config": f"`{config.file or config.name}`",
        "schedule": ", ".join(f"{name} `{value}`" for name, value in config.schedule.to_dict().items()),
        "steps": ", ".join(f"{row.name} {row.timing.steps}" for row in rows if row.timing),
        "training": ", ".join(f"{name} `{value}`" for name, value in sorted(arguments.items())),
        "runs": ", ".join(f"`{Path(row.config.output_dir).name}`" for row in rows if row.timing),
        **{name: str(value) for name, value in where.items() if value is not None},
    }


def _subrun(config: Config, name: str) -> Config:
    return replace(config, name=f"{config.name}/{name}", output_dir=str(Path(config.output_dir) / name))
