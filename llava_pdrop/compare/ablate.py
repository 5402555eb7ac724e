"""Runs an ablation: all variants are checked, then trained one after the other (or evaluated), then put together."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_pdrop.checkpoint.build import Parts, build_parts
from llava_pdrop.checkpoint.shards import resolve
from llava_pdrop.compare.compare import training_batches
from llava_pdrop.compare.runs import read_run, with_savings
from llava_pdrop.compare.variants import Ablation, Variant
from llava_pdrop.config.schema import Config, PaperRow
from llava_pdrop.cost.flops import predicted_reduction
from llava_pdrop.cost.lora import learning
from llava_pdrop.cost.nominal import model_of, nominal_batch, recomputed_by
from llava_pdrop.cost.plan import Plan, make_plan, plan_step
from llava_pdrop.errors import ConfigError
from llava_pdrop.eval.evaluate import answer, check_scorer, evaluate_config, load_questions, respondent_of
from llava_pdrop.eval.measure import load_benchmarks, measure, measure_config
from llava_pdrop.eval.score import Score
from llava_pdrop.eval.team import team_of
from llava_pdrop.runtime.device import release_memory
from llava_pdrop.train.checks import check_run
from llava_pdrop.train.run import prepare_data, say, train

STEPS_COUNTED = 100
"""Steps of a run whose batches the predicted saving is counted on."""


@dataclass(frozen=True)
class AblationRow:
    """One variant in the table. ``plan`` is of a picture that fills every tile; ``predicted`` and ``realised`` are
    shares saved of what a training step costs without drops, or, where a checkpoint is evaluated, of the prompt's
    operations and of the time of an answer. ``seconds`` are of a step or an answer, on ``device``. ``paper`` is about
    trained models; ``scores`` are those of ``eval.benchmarks``."""

    name: str
    plan: Plan
    predicted: float | None
    evaluation: dict[str, Any] | None = None
    seconds: float | None = None
    device: str = "cpu"
    realised: float | None = None
    paper: PaperRow | None = None
    scores: tuple[Score, ...] = ()


def plan(ablation: Ablation) -> list[AblationRow]:
    """The table as far as it is known without weights and data.

    Raises:
        ConfigError: the sizes of a variant's model are not known here.
    """
    rows = []
    for variant in ablation.variants:
        predicted = _predicted_by_plan(ablation, variant.config)
        paper = variant.config.paper if ablation.checkpoint is None else None
        rows.append(AblationRow(variant.name, make_plan(variant.config), predicted, paper=paper))
    return rows


def ablate(ablation: Ablation, rows: list[AblationRow]) -> list[AblationRow] | None:
    """Trains what is not finished yet and measures; None on all but the first process. Names, files and questions of
    every variant are checked before the first one starts.

    Args:
        rows: of `plan`.

    Raises:
        ConfigError: a run cannot be made; a checkpoint is given, but no questions.
        Preempted: a signal said stop; the same call goes on.
    """
    for variant in ablation.variants:
        check_scorer(variant.config)
        if ablation.checkpoint is None:
            check_run(variant.config)
    for variant in ablation.variants:
        prepare_data(variant.config)
        load_questions(variant.config)  # a broken file is then said before hours of training
        load_benchmarks(variant.config, llava=True)
    for line in missing_lines(ablation):
        say(line)
    if ablation.checkpoint is not None:
        measured = _evaluate_checkpoint(ablation, ablation.checkpoint)
    else:
        measured_by = dict[str, list[Score]]()
        for number, variant in enumerate(ablation.variants, 1):
            say(f"variant {number} of {len(ablation.variants)}: {variant.name}")
            train(variant.config)
            if variant.config.data.eval is not None:
                evaluate_config(variant.config)
                release_memory()
            if variant.config.eval.benchmarks:
                measured_by[variant.name] = measure_config(variant.config)
                release_memory()
        measured = _read_runs(ablation) if os.environ.get("RANK", "0") == "0" else None
        for variant, found in zip(ablation.variants, measured or []):
            found["scores"] = tuple(
                replace(score, column=variant.name if place == 0 else f"{variant.name} + {score.column}")
                for own in _by_benchmark(measured_by.get(variant.name, []))
                for place, score in enumerate(own)
            )
    return None if measured is None else [replace(row, **found) for row, found in zip(rows, measured)]


def _by_benchmark(scores: list[Score]) -> list[list[Score]]:
    return [[score for score in scores if score.benchmark == row] for row in dict.fromkeys(s.benchmark for s in scores)]


def missing_lines(ablation: Ablation) -> list[str]:
    """What the table will lack because of what the ablation leaves out, one line each."""
    lines = []
    if all(variant.config.schedule.layers for variant in ablation.variants):
        lines.append("no variant without drops: no realised saving (add vanilla: {pyramid_drop: null})")
    if all(variant.config.data.eval is None for variant in ablation.variants):
        lines.append("data.eval is null: no accuracy")
    return lines


def _predicted_by_plan(ablation: Ablation, config: Config) -> float | None:
    if not config.schedule.layers:
        return None
    if ablation.checkpoint is None:
        return plan_step(config).reduction
    model = model_of(config)
    return predicted_reduction(
        model.config, [nominal_batch(model.geometry, config)], config.schedule, model.geometry, trainable=()
    )


def _read_runs(ablation: Ablation) -> list[dict[str, Any]]:
    """What the finished runs tell."""
    runs = [read_run(Path(variant.config.output_dir)) for variant in ablation.variants]
    batches = _Batches()
    return [
        {
            "predicted": batches.saved(variant) if variant.config.schedule.layers else None,
            "evaluation": run.evaluation,
            "seconds": run.timing.seconds if run.timing else None,
            "device": run.timing.device if run.timing else "cpu",
            "realised": run.saved,
        }
        for variant, run in zip(ablation.variants, with_savings(runs))
    ]


class _Batches:
    """Counts operations on the batches that runs were trained on; runs with the same data read them once."""

    def __init__(self) -> None:
        self._run: Config | None = None
        self._parts: Parts | None = None
        self._batches: list[Any] = []

    def saved(self, variant: Variant) -> float:
        """Share of the operations of a step without drops that ``variant`` saves."""
        config = variant.config
        alike = replace(config, name="", output_dir="", pyramid_drop=None, pretrain=None, paper=None)
        if self._parts is None or alike != self._run:
            arguments = config.train.arguments
            steps = min(arguments.get("max_steps", -1), STEPS_COUNTED)
            arguments = {**arguments, "max_steps": steps if steps > 0 else STEPS_COUNTED}
            self._run, self._parts = alike, build_parts(path=config.output_dir)
            first = replace(config, train=replace(config.train, arguments=arguments))
            self._batches = training_batches(first, self._parts)
        return predicted_reduction(
            self._parts.hf.config,
            self._batches,
            config.schedule,
            self._parts.geometry,
            learning(config),
            recomputed_by(config, self._parts.hf.config.text_config.num_hidden_layers),
        )


def _evaluate_checkpoint(ablation: Ablation, checkpoint: str) -> list[dict[str, Any]] | None:
    """``checkpoint`` with the schedule of every variant; None on all but the first process."""
    first = ablation.variants[0].config
    if first.eval.training_free:
        raise ConfigError(f"{ablation.file}: eval.training_free: the variants are the schedules: leave the word out")
    questions = load_questions(first)
    loaded = load_benchmarks(first, llava=True)
    if not questions and not loaded:
        raise ConfigError(f"{ablation.file}: data.eval: names no file with questions, and nothing is trained")
    found: list[dict[str, Any]] = []
    with team_of(first, ablation.output_dir) as team:
        parts = build_parts(path=checkpoint)
        if parts.geometry != model_of(first).geometry:
            raise ConfigError(
                f"{ablation.file}: checkpoint {checkpoint} cuts pictures otherwise than {first.file} says: "
                f"{parts.geometry}"
            )
        respondent = respondent_of(parts, first)
        columns = {variant.name: variant.config.schedule for variant in ablation.variants}
        model = resolve(checkpoint)
        scores = measure(first, respondent, loaded, columns, ablation.output_dir, team, {}, model)
        if questions:
            answer(first, parts, questions[: first.eval.batch_size], first.schedule, None)  # what is slow once
        for variant in ablation.variants:
            config = variant.config
            own: dict[str, Any] = {"scores": tuple(score for score in scores if score.column == variant.name)}
            found.append(own)
            if not questions:
                continue
            result = answer(config, parts, questions, config.schedule, variant.name, team)
            if team.first:
                result.write(ablation.output_dir / "predictions", f"{variant.name}.jsonl")
            device = next(parts.hf.parameters()).device.type
            evaluation = {"scorer": config.eval.scorer, "accuracy": result.accuracy, "chance": result.chance}
            evaluation |= {"questions": len(questions), "image_tokens": result.image_tokens}
            seconds = (result.seconds if device == "cuda" else result.cpu_seconds) / len(questions)
            own |= {"evaluation": evaluation, "seconds": seconds, "device": device}
    if not team.first:
        return None
    if not questions:
        return found
    plain = [line["seconds"] for variant, line in zip(ablation.variants, found) if not variant.config.schedule.layers]
    for variant, line in zip(ablation.variants, found):
        drops = bool(variant.config.schedule.layers)
        line["realised"] = 1 - line["seconds"] / plain[-1] if plain and drops else None
    return found
