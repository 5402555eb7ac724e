"""What `compare` and `ablate` have in common: models are trained where they have to be, and answer the same questions,
with one schedule or several. Every answer is a row of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_pdrop.checkpoint.build import build_parts
from llava_pdrop.checkpoint.shards import resolve
from llava_pdrop.compare.counted import with_predictions
from llava_pdrop.compare.rows import VariantRow, with_times
from llava_pdrop.compare.survivors import examples
from llava_pdrop.compare.turns import with_savings
from llava_pdrop.config.schema import Config
from llava_pdrop.cost.nominal import model_of
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.evaluate import AnswerSettings, answer, leave, load_questions, respondent_of
from llava_pdrop.eval.measure import Examinee, chosen, load_benchmarks, measure_run
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.score import Score
from llava_pdrop.eval.team import Team, team_of
from llava_pdrop.report.console import say
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.schedule import Schedule
from llava_pdrop.train.checks import CheckedRun
from llava_pdrop.train.run import prepare_data, train_checked

Exam = tuple[list[Question], dict[Benchmark, list[Question]]]
"""The questions of ``data.eval``, and those of ``eval.benchmarks``."""


@dataclass(frozen=True)
class Candidate:
    """A model and the rows that it answers for: the first has its config, the others other schedules.

    Attributes:
        run: how it is trained; None: it is there, as the ``model.path`` of the config.
        training_free: decoder layers -> schedules by name, which get a row each too.
        pictures: held-out pictures for which it is kept which image tokens survive.
    """

    rows: tuple[VariantRow, ...]
    run: CheckedRun | None = None
    training_free: Callable[[int], Mapping[str, Schedule]] | None = None
    pictures: int = 0


def subrun(config: Config, name: str) -> Config:
    """The run ``name`` of several, in a directory of its own below that of ``config``."""
    return replace(config, name=f"{config.name}/{name}", output_dir=str(Path(config.output_dir) / name))


def run_variants(models: Sequence[Candidate], out: Path) -> list[VariantRow] | None:
    """Trains every model that is not finished yet, asks it, and says what dropping saves. All processes share the
    questions. Predictions go below ``out``.

    Returns:
        the rows, those of ``compare.training_free`` behind all others; None on all but the first process.

    Raises:
        ConfigError, UserError: questions are missing or broken, which is found out before hours of training; a run
            cannot be made.
        Preempted: a signal said stop; the same call goes on.
    """
    exams, before = list[Exam](), None
    for model in models:
        config = model.rows[0].config
        prepare_data(config)
        asks = (config.data, config.eval, chosen(config))
        exams.append(exam_of(config) if asks != before else exams[-1])  # read once for variants that ask the same
        before = asks
        if model.run is None and not any(exams[-1]):
            raise ConfigError(f"{config.file}: data.eval: names no file with questions, and nothing is trained")
    for line in missing_lines([row.config for model in models for row in model.rows]):
        say(line)
    own, others = list[VariantRow](), list[VariantRow]()
    for number, (model, exam) in enumerate(zip(models, exams), 1):
        if model.run is not None:
            say(f"variant {number} of {len(models)}: {model.rows[0].name}")
            train_checked(model.run)
        with team_of(model.rows[0].config, out) as team:
            first, *rest = asked(model, exam, team, out)
        own, others = [*own, first], [*others, *rest]
        release_memory()
    return with_predictions(with_savings([*own, *others])) if team.first else None


def exam_of(config: Config) -> Exam:
    """What ``config`` asks."""
    return load_questions(config), load_benchmarks(config, llava=True)


def missing_lines(configs: Sequence[Config]) -> list[str]:
    """What the table will lack because of what the ``configs`` of its rows leave out, one line each."""
    lines = {
        "no run without drops: no realised saving, and no training-free rows (compare.vanilla is false, or no variant "
        "of the ablation is vanilla: {pyramid_drop: null})": all(not config.schedule.vanilla for config in configs),
        "data.eval is null: no accuracy, chance or image tokens per stage, and no example pictures": all(
            config.data.eval is None for config in configs
        ),
    }
    return [line for line, holds in lines.items() if holds]


def asked(model: Candidate, exam: Exam, team: Team, out: Path, weights: Path | None = None) -> list[VariantRow]:
    """The rows of a model that is there, with what it answers; the first process of ``team`` alone has the numbers.

    Args:
        out: where predictions go.
        weights: those of the run, if they are not in its ``output_dir``.

    Raises:
        ConfigError: the model cuts pictures otherwise than the plan of its rows says.
    """
    first, *others = model.rows
    config, run = first.config, None if model.run is None else Path(first.config.output_dir)
    first = first if run is None else with_times(first, run)
    settings, (questions, sets) = AnswerSettings.of(config), exam
    if not any(exam):
        return [first, *others]
    path = str(weights or run or config.model.path)
    parts = build_parts(path=path)
    if run is None and parts.geometry != model_of(config).geometry:
        raise ConfigError(f"{config.file}: checkpoint {path} cuts pictures otherwise than this says: {parts.geometry}")
    respondent = respondent_of(parts, config)
    if model.training_free:
        free = model.training_free(parts.hf.config.text_config.num_hidden_layers).items()
        others += [VariantRow(f"{first.name} + {name}", replace(config, pyramid_drop=drops)) for name, drops in free]
    columns = {row.name: row.schedule for row in others}
    if run is not None:
        scores = measure_run(config, run, respondent, sets, team, columns) if sets else []
    else:
        columns = {first.name: first.schedule, **columns}
        scores = Examinee(settings, respondent, team, out, resolve(path)).measure(sets, columns, paper={})
    rows = with_scores([first, *others], scores)
    if questions:
        answer(settings, respondent, questions[: settings.batch_size], first.schedule, None)  # what is slow once
    for place, row in enumerate(rows if questions else ()):
        result = answer(settings, respondent, questions, row.schedule, row.name, team)
        found = {"scorer": settings.scorer, **result.facts(), "eval_seconds": result.seconds}
        if team.first:
            result.write(out / "predictions", row.name.replace(" + ", "_on_") + ".jsonl")
            if run is not None and place == 0:
                found |= leave(config, run, respondent, questions, result)
        seconds = result.seconds if settings.device.type == "cuda" else result.cpu_seconds
        times = {"answer_seconds": seconds / len(questions), "answer_device": settings.device.type}
        rows[place] = replace(row, evaluation=found, **times)
    if model.pictures and team.first:
        shown = examples(settings, respondent, questions[: model.pictures], first.schedule)
        rows[0] = replace(rows[0], examples=tuple(shown))
    return rows


def with_scores(rows: Sequence[VariantRow], scores: Sequence[Score]) -> list[VariantRow]:
    """Every row with its ``scores``. Those of no other row are the first one's: its own schedule's, of each benchmark
    the first, and what ``eval.training_free`` added."""
    first, *others = rows
    names = {row.name for row in others}
    mine = [score for score in scores if score.column not in names]
    own = {score.benchmark: score for score in reversed(mine)}
    columns = [first.name if own[score.benchmark] is score else f"{first.name} + {score.column}" for score in mine]
    mine = [replace(score, column=column) for score, column in zip(mine, columns)]
    theirs = [tuple(score for score in scores if score.column == row.name) for row in others]
    return [replace(row, scores=found) for row, found in zip(rows, [tuple(mine), *theirs])]
