"""The answers of one model with several schedules, and the questions that they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_pdrop.checkpoint.build import Parts
from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.config.schema import Config
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.evaluate import answer, check_scorer, load_questions, respondent_of
from llava_pdrop.eval.measure import load_benchmarks, measure
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.team import Team


@dataclass(frozen=True)
class Questions:
    """Of ``data.eval`` and of ``eval.benchmarks``."""

    own: list[Question]
    benchmarks: dict[Benchmark, list[Question]]

    @classmethod
    def of(cls, config: Config) -> Questions:
        """What ``config`` asks.

        Raises:
            ConfigError, UserError: a file is missing or broken: this is found out before hours of training.
        """
        check_scorer(config)
        return cls(load_questions(config), load_benchmarks(config, llava=True))


def evaluated(
    rows: Sequence[VariantRow], parts: Parts, asked: Questions, team: Team, out: Path, model: Path, home: Path
) -> list[VariantRow]:
    """``rows`` with what one model answers with the schedule of each. All processes of ``team`` share the questions;
    the first one alone has the numbers.

    Args:
        out: where the predictions of all rows go, below ``predictions``.
        model: directory of the model.
        home: where the answers to benchmarks are kept, below ``benchmarks``.
    """
    config, completed = rows[0].config, []
    respondent = respondent_of(parts, config)
    schedules = {row.name: row.schedule for row in rows}
    paper = {row.name: row.paper.scores for row in rows if row.paper}
    scores = measure(config, respondent, asked.benchmarks, schedules, home, team, paper, model)
    if asked.own:
        answer(config, respondent, asked.own[: config.eval.batch_size], rows[0].schedule, None)  # what is slow once
    for row in rows:
        row = replace(row, scores=tuple(score for score in scores if score.column == row.name))
        if asked.own:
            result = answer(config, respondent, asked.own, row.schedule, row.name, team)
            if team.first:
                result.write(out / "predictions", row.name.replace(" + ", "_on_") + ".jsonl")
            device = next(parts.hf.parameters()).device.type
            seconds = result.seconds if device == "cuda" else result.cpu_seconds
            evaluation = {"scorer": config.eval.scorer, **result.facts(), "seconds": result.seconds}
            row = replace(row, evaluation=evaluation, answer_seconds=seconds / len(asked.own), answer_device=device)
        completed.append(row)
    return completed
