"""The answers of one model with several schedules, and the questions that they are asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llava_pdrop.compare.rows import VariantRow
from llava_pdrop.config.schema import Config
from llava_pdrop.eval.benchmarks.base import Benchmark
from llava_pdrop.eval.evaluate import AnswerSettings, answer, check_scorer, load_questions
from llava_pdrop.eval.measure import load_benchmarks, measure
from llava_pdrop.eval.questions import Question
from llava_pdrop.eval.respondent import Respondent
from llava_pdrop.eval.team import Team


@dataclass(frozen=True)
class Exam:
    """The questions of ``data.eval`` and of ``eval.benchmarks``, and how they are asked."""

    settings: AnswerSettings
    questions: list[Question]
    benchmarks: dict[Benchmark, list[Question]]

    @classmethod
    def of(cls, config: Config) -> Exam:
        """What ``config`` asks.

        Raises:
            ConfigError, UserError: a file is missing or broken: this is found out before hours of training.
        """
        check_scorer(config)
        return cls(AnswerSettings.of(config), load_questions(config), load_benchmarks(config, llava=True))


def evaluated(
    rows: Sequence[VariantRow], respondent: Respondent, exam: Exam, team: Team, out: Path, model: Path, home: Path
) -> list[VariantRow]:
    """``rows`` with what one model answers with the schedule of each. All processes of ``team`` share the questions;
    the first one alone has the numbers.

    Args:
        out: where the predictions of all rows go, below ``predictions``.
        model: directory of the model.
        home: where the answers to benchmarks are kept, below ``benchmarks``.
    """
    settings, questions, completed = exam.settings, exam.questions, list[VariantRow]()
    schedules = {row.name: row.schedule for row in rows}
    paper = {row.name: row.paper.scores for row in rows if row.paper}
    scores = measure(settings, respondent, exam.benchmarks, schedules, home, team, paper, model)
    if questions:
        answer(settings, respondent, questions[: settings.batch_size], rows[0].schedule, None)  # what is slow once
    for row in rows:
        row = replace(row, scores=tuple(score for score in scores if score.column == row.name))
        if questions:
            result = answer(settings, respondent, questions, row.schedule, row.name, team)
            if team.first:
                result.write(out / "predictions", row.name.replace(" + ", "_on_") + ".jsonl")
            seconds = result.seconds if settings.device.type == "cuda" else result.cpu_seconds
            row = replace(
                row,
                evaluation={"scorer": settings.scorer, **result.facts(), "eval_seconds": result.seconds},
                answer_seconds=seconds / len(questions),
                answer_device=settings.device.type,
            )
        completed.append(row)
    return completed
